"""Linear datamodeling score and leave-one-out correlation against SciPy."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from torchmetrics import MetricCollection
from torchmetrics.functional import spearman_corrcoef

from lightning_dtda.errors import AttributionError
from lightning_dtda.evaluation import LeaveOneOutCorrelation, LinearDatamodelingScore
from lightning_dtda.evaluation.functional import leave_one_out_correlation, linear_datamodeling_score
from lightning_dtda.statistics.correlation import correlations
from tests.simulated import experiment, normal


@pytest.fixture
def samples():
    return experiment(torch.Generator().manual_seed(0))[0]


def plainly(difference, before, after):
    """A difference of two samples in NumPy."""
    if difference == "mean":
        return after.mean() - before.mean()
    if difference == "variance":
        return after.var(ddof=1) - before.var(ddof=1)
    number = math.lcm(len(before), len(after))
    quantiles = [np.sort(np.repeat(each, number // len(each))) for each in (before, after)]
    return np.sqrt(np.mean((quantiles[0] - quantiles[1]) ** 2))


def influences(difference, baseline, changed):
    """Influences ``(subsets, queries)``, one by one."""
    subsets, _, queries = changed.shape
    return np.array(
        [
            [plainly(difference, baseline[:, q].numpy(), changed[k, :, q].numpy()) for q in range(queries)]
            for k in range(subsets)
        ]
    )


@pytest.mark.parametrize("difference", ["mean", "variance", "wasserstein"])
def test_score_is_scipys_correlation_of_the_differences_averaged_over_queries(samples, difference):
    predicted, baseline, real, real_baseline = samples
    one, other = influences(difference, baseline, predicted), influences(difference, real_baseline, real)
    expected = [spearmanr(one[:, q], other[:, q]).statistic for q in range(one.shape[1])]
    found = linear_datamodeling_score(*samples, difference, replicates=0)
    # sums of 12 ranks in double precision
    np.testing.assert_allclose(found["per_query"], expected, rtol=1e-12)
    assert found["score"].item() == pytest.approx(np.mean(expected), rel=1e-12)
    numbers = {name: int(found[name]) for name in ("subsets", "runs", "seeds", "baseline_seeds", "queries")}
    assert numbers == {"subsets": 12, "runs": 6, "seeds": 8, "baseline_seeds": 10, "queries": 5}
    assert found["low"].isnan()
    assert found["high"].isnan()


def test_leave_one_out_correlation_is_scipys(samples):
    predicted, baseline, real, real_baseline = samples
    one, other = influences("mean", baseline, predicted), influences("mean", real_baseline, real)
    for name, function in (("pearson", pearsonr), ("spearman", spearmanr)):
        expected = [function(one[:, q], other[:, q]).statistic for q in range(one.shape[1])]
        found = leave_one_out_correlation(*samples, correlation=name, replicates=0)
        np.testing.assert_allclose(found["per_query"], expected, rtol=1e-10)


def test_ties_are_ranked_as_scipy_ranks_them():
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randint(4, (2, 3, 30), generator=generator).double()
    expected = [spearmanr(a, b).statistic for a, b in zip(one, other, strict=True)]
    np.testing.assert_allclose(correlations(one, other), expected, rtol=1e-12)


def test_a_perfect_order_scores_one_exactly_where_torchmetrics_falls_short():
    generator = torch.Generator().manual_seed(0)
    values = normal(generator, 3, 6)
    assert (1 - correlations(values, values.exp())).abs().max() < 1e-15
    # its denominator is 1e-6 too large: why correlations are not left to it
    assert (1 - spearman_corrcoef(values.T, values.exp().T)).abs().max() > 1e-8


def test_a_query_without_real_influence_does_not_count_and_one_without_predicted_counts_zero(samples):
    predicted, baseline, real, real_baseline = (each.clone() for each in samples)
    before = linear_datamodeling_score(*samples)
    real[:, :, 1] = real[0, :, 1]
    predicted[:, :, 3] = predicted[0, :, 3]
    found = linear_datamodeling_score(predicted, baseline, real, real_baseline)
    assert found["per_query"].isnan().tolist() == [False, True, False, False, False]
    assert found["per_query"][3] == 0
    assert (found["constant_queries"], found["constant_predictions"]) == (1, 1)
    expected = before["per_query"][[0, 2, 4]].sum() / 4
    assert found["score"].item() == pytest.approx(expected.item(), rel=1e-12)
    assert not any(found[name].isnan() for name in ("low", "high", "ceiling"))


def test_truth_without_any_influence_is_refused(samples):
    predicted, baseline, real, real_baseline = samples
    with pytest.raises(AttributionError, match="same for all 12 removals on every query"):
        linear_datamodeling_score(predicted, baseline, real[:1].expand_as(real), real_baseline)


def test_one_subset_is_refused(samples):
    predicted, baseline, real, real_baseline = samples
    with pytest.raises(AttributionError, match="There are 1 removals"):
        linear_datamodeling_score(predicted[:1], baseline, real[:1], real_baseline)


def test_too_few_samples_for_the_difference_are_named(samples):
    predicted, baseline, real, real_baseline = samples
    for replaced, message in (
        ((predicted[:, :1], baseline[:1], real, real_baseline), "needs at least 2 runs; there are 1"),
        ((predicted, baseline, real[:, :1], real_baseline), "needs at least 2 seeds; there are 1"),
        ((predicted, baseline, real, real_baseline[:1]), "needs at least 2 baseline seeds; there are 1"),
    ):
        with pytest.raises(AttributionError, match=message):
            linear_datamodeling_score(*replaced, "variance")


@pytest.mark.parametrize(
    ("position", "change", "message"),
    [
        (0, lambda each: each[0], "must have shape \\(removals, samples, queries\\)"),
        (0, lambda each: each[:, :4], "same runs and queries"),
        (2, lambda each: each[:5], "predictions for 12 removals, but 5"),
        (3, lambda each: each[:, :2], "the queries, must be the same"),
        (2, lambda each: each.masked_fill(each == each.max(), torch.nan), "not finite"),
        (3, lambda each: each.long(), "floating-point"),
    ],
)
def test_samples_that_do_not_fit_are_refused(samples, position, change, message):
    changed = list(samples)
    changed[position] = change(changed[position])
    with pytest.raises(AttributionError, match=message):
        linear_datamodeling_score(*changed)


def test_a_difference_that_compares_run_by_run_needs_as_many_baseline_seeds(samples):
    from lightning_dtda.statistics import Mean

    predicted, baseline, real, real_baseline = samples
    with pytest.raises(AttributionError, match=r"compares run by run, but there are 10 .* for 8"):
        linear_datamodeling_score(predicted, baseline, real, real_baseline, Mean("median"))
    assert linear_datamodeling_score(predicted, baseline, real, real_baseline[:8], Mean("median"))["score"] > 0


def test_batches_of_queries_add_up(samples):
    predicted, baseline, real, real_baseline = samples
    whole, parts = LinearDatamodelingScore("wasserstein"), LinearDatamodelingScore("wasserstein")
    whole.update(*samples)
    for queries in (slice(0, 2), slice(2, 5)):
        parts.update(predicted[..., queries], baseline[:, queries], real[..., queries], real_baseline[:, queries])
    for name, value in whole.compute().items():
        assert torch.equal(parts.compute()[name], value), name


def test_batches_of_other_models_are_refused(samples):
    predicted, baseline, real, real_baseline = samples
    metric = LinearDatamodelingScore()
    metric.update(*samples)
    with pytest.raises(AttributionError, match=r"real has \(7, 12\) .* earlier queries had \(8, 12\)"):
        metric.update(predicted, baseline, real[:, :7], real_baseline)


def test_differences_in_a_collection_keep_their_samples_once(samples):
    names = ("mean", "variance", "wasserstein")
    collection = MetricCollection({name: LinearDatamodelingScore(name, replicates=0) for name in names})
    collection.update(*samples)
    assert len(collection.compute_groups) == 1
    found = collection.compute()
    for name in names:
        expected = linear_datamodeling_score(*samples, name, replicates=0)["score"]
        assert any(torch.equal(value, expected) for key, value in found.items() if name in key)


def test_half_precision_measurements_are_compared_in_double(samples):
    rounded = tuple(each.half() for each in samples)
    found = linear_datamodeling_score(*rounded, "variance", replicates=20)
    expected = linear_datamodeling_score(*(each.double() for each in rounded), "variance", replicates=20)
    assert found["score"].dtype == torch.float64
    assert torch.equal(found["score"], expected["score"])
    metric = LinearDatamodelingScore("variance", replicates=20)
    metric.update(*rounded)
    assert torch.equal(metric.compute()["low"], expected["low"])


def test_settings_that_do_not_exist_are_refused():
    with pytest.raises(AttributionError, match="choose from spearman, pearson"):
        LeaveOneOutCorrelation(correlation="kendall")
    with pytest.raises(AttributionError, match="Unknown difference"):
        LinearDatamodelingScore("median")


def test_scores_plot_themselves_with_interval_and_ceiling_as_torchmetrics_do(samples):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    metric = LinearDatamodelingScore(replicates=50)
    metric.update(*samples)
    found = metric.compute()
    shown = ("score", "low", "high", "ceiling")
    _, axes = metric.plot()
    drawn = {line.get_label(): line.get_ydata()[0] for line in axes.lines}
    assert {name: drawn[name] for name in shown} == {name: pytest.approx(float(found[name])) for name in shown}
    # several results over their number, on axes that are given
    given = pyplot.subplots()[1]
    metric.plot([found, {**found, "score": found["score"] / 2}], ax=given)
    [line] = [line for line in given.lines if line.get_label() == "score"]
    np.testing.assert_allclose(line.get_ydata(), [found["score"], found["score"] / 2])
    pyplot.close("all")
