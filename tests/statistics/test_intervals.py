"""Bootstrap intervals: against SciPy, and how often they hold the truth."""

import numpy as np
import pytest
import torch
from scipy import stats

from lightning_dtda.errors import AttributionError
from lightning_dtda.statistics.differences import Tail
from lightning_dtda.statistics.intervals import student_interval
from tests.simulated import attribution_of


@pytest.fixture
def attribution():
    generator = torch.Generator().manual_seed(0)
    baseline = torch.randn(20, 2, generator=generator, dtype=torch.float64).exp()
    responses = 0.2 + 0.5 * torch.randn(20, 2, 3, generator=generator, dtype=torch.float64)
    return attribution_of(baseline, responses)


@pytest.mark.parametrize("name", ["mean", "variance"])
def test_the_interval_is_scipys_accelerated_one(attribution, name):
    x = attribution.baseline[:, 1].numpy()
    y = x + attribution.responses[:, 1, 2].numpy()

    def statistic(x, y, axis):
        if name == "mean":
            return y.mean(axis) - x.mean(axis)
        return y.var(axis, ddof=1) - x.var(axis, ddof=1)

    expected = stats.bootstrap(
        (x, y), statistic, paired=True, n_resamples=20000, confidence_level=0.9, rng=np.random.default_rng(0)
    ).confidence_interval
    found = attribution.interval(name, level=0.9, replicates=20000)[:, 1, 2]
    # both are quantiles at 5 % of 20,000 draws: known to about 1 % of the width, differently drawn
    width = expected.high - expected.low
    np.testing.assert_allclose(found, [expected.low, expected.high], atol=0.03 * width)


# of Gaussian responses; Efron's intervals are too narrow with few runs
@pytest.mark.parametrize(("runs", "least"), [(8, 0.85), (20, 0.91), (64, 0.93)])
def test_intervals_hold_the_truth_about_as_often_as_they_say(runs, least):
    generator = torch.Generator().manual_seed(0)
    responses = 0.5 + torch.randn(runs, 1, 2000, generator=generator, dtype=torch.float64)
    attribution = attribution_of(torch.randn(runs, 1, generator=generator, dtype=torch.float64), responses)
    lower, upper = attribution.interval("mean")
    held = ((lower <= 0.5) & (upper >= 0.5)).double().mean()
    assert least <= held <= 0.97


def test_shapes_order_and_sets(attribution):
    ends = attribution.interval("wasserstein")
    assert ends.shape == (2, 2, 3)
    assert (ends[0] < ends[1]).all()
    together = attribution.interval(Tail(0.5), removed=[0, 2])
    assert together.shape == (2, 2)
    alone = attribution.interval("mean", removed=[1])
    torch.testing.assert_close(alone, attribution.interval("mean")[..., 1])


def test_without_any_response_the_interval_is_a_point():
    attribution = attribution_of(torch.randn(9, 1, dtype=torch.float64), torch.zeros(9, 1, 1, dtype=torch.float64))
    assert attribution.interval("variance").flatten().tolist() == [0, 0]


@pytest.mark.parametrize(
    ("arguments", "match"), [({"level": 1.0}, "level=1.0"), ({"replicates": 1}, "at least 2, better 1000")]
)
def test_senseless_settings_are_refused(attribution, arguments, match):
    with pytest.raises(AttributionError, match=match):
        attribution.interval("mean", **arguments)


def test_two_runs_give_no_interval_for_the_variance(attribution):
    few = attribution_of(attribution.baseline[:2], attribution.responses[:2])
    with pytest.raises(AttributionError, match="needs 3 runs; there are 2"):
        few.interval("variance")


def test_students_interval_is_scipys_of_one_sample_and_of_two():
    generator = torch.Generator().manual_seed(0)
    y, x = (scale * torch.randn(n, 3, generator=generator, dtype=torch.float64) for n, scale in ((9, 1.0), (15, 2.0)))
    two, one = stats.ttest_ind(y, x, equal_var=False), stats.ttest_1samp(y, 0)
    for found, expected in ((student_interval(y, x, level=0.9), two), (student_interval(y, level=0.9), one)):
        low, high = expected.confidence_interval(0.9)
        np.testing.assert_allclose(found, np.stack([low, high]), rtol=1e-10)
    assert student_interval(torch.ones(4), torch.zeros(4), level=0.9).tolist() == [1, 1]
