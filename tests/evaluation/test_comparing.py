"""The difference of two scores: its interval against worlds in which the right answer is known, and the refusals."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from lightning_dtda import Attribution, GroundTruth
from lightning_dtda.errors import AttributionError
from lightning_dtda.evaluation import compare, evaluate
from lightning_dtda.statistics.correlation import correlations
from lightning_dtda.statistics.crossed_bootstrap import Resamples, confidence_interval, difference_interval, replicate
from lightning_dtda.statistics.differences import Mean
from lightning_dtda.statistics.samples import arrange, collect
from tests.simulated import normal

WORLDS = 200
SUBSETS, QUERIES, RUNS, SEEDS = 25, 8, 6, 8


def two_predictions(generator, wrong, same_runs):
    """Samples of two predictions of the same truth, that err by so much.

    The errors of the runs are the same in both where the runs are: the noise of one ensemble.
    """
    effects = normal(generator, SUBSETS, 1, QUERIES) + normal(generator, SUBSETS, 1, 1)
    real = effects + 3 * normal(generator, SUBSETS, SEEDS, QUERIES)
    real_baseline = normal(generator, SEEDS, QUERIES)
    of_runs = normal(generator, SUBSETS, RUNS, QUERIES)
    found = []
    for size in wrong:
        of_runs = of_runs if same_runs else normal(generator, SUBSETS, RUNS, QUERIES)
        predicted = effects + size * normal(generator, SUBSETS, 1, QUERIES) + of_runs
        baseline = torch.zeros(RUNS, QUERIES, dtype=torch.float64)
        found.append(collect(arrange(predicted, baseline, real, real_baseline)))
    return found


def of_queries(samples):
    return correlations(samples.predicted_influence(Mean()), samples.real_influence(Mean()))


def replicated(samples, runs, number=200):
    draws = Resamples.of(samples, number, seed=0, runs=(runs,))
    return replicate(samples, Mean(), of_queries(samples), "spearman", draws)


@pytest.mark.slow
@pytest.mark.parametrize("same_runs", [True, False], ids=["of the same runs", "of other runs"])
@pytest.mark.parametrize("wrong", [(0.3, 1.0), (0.8, 0.8)], ids=["one better", "equally good"])
def test_intervals_cover_the_expected_difference_and_are_narrower_than_those_of_the_scores(wrong, same_runs):
    generator = torch.Generator().manual_seed(0)
    worlds = [[of_queries(each).mean() for each in two_predictions(generator, wrong, same_runs)] for _ in range(2000)]
    apart = torch.tensor([first - second for first, second in worlds])
    covered, widths, apart_widths = [], [], []
    for _ in range(WORLDS):
        samples = two_predictions(generator, wrong, same_runs)
        first, second = (
            replicated(each, "mine" if same_runs else name) for each, name in zip(samples, ("a", "b"), strict=True)
        )
        low, high = difference_interval(first, second)
        covered.append(bool(low <= apart.mean() <= high))
        widths.append(float(high - low))
        separate = [confidence_interval(each.score, each.scores()) for each in (first, second)]
        apart_widths.append(float(sum((high - low) ** 2 for low, high in separate) ** 0.5))
    # of 95 %, less two standard errors of 200 worlds
    assert np.mean(covered) > 0.92
    # no wider than needed by more than the intervals of scores are, and narrower than from two intervals
    needed = float(apart.quantile(0.975) - apart.quantile(0.025))
    assert np.mean(widths) / needed < 1.4
    assert np.mean(widths) < 0.9 * np.mean(apart_widths)


def test_the_same_runs_are_drawn_together_and_others_apart():
    samples, _ = two_predictions(torch.Generator().manual_seed(0), (0.5, 0.5), True)
    one, same, other = (Resamples.of(samples, 50, 0, runs) for runs in (("a", "b"), ("a", "b"), ("a", "c")))
    assert torch.equal(one.runs, same.runs)
    assert not torch.equal(one.runs, other.runs)
    for part in ("removals", "seeds", "baseline_seeds", "queries"):
        assert torch.equal(getattr(one, part), getattr(other, part)), "the truth is the same"


def test_runs_and_their_repetitions_are_drawn_together():
    # a perfect prediction of repeated runs is perfect in every draw
    generator = torch.Generator().manual_seed(0)
    changed, baseline = normal(generator, SUBSETS, RUNS, QUERIES), normal(generator, RUNS, QUERIES)
    arranged = arrange(changed, baseline, changed, baseline)
    together, apart = (collect(arranged, paired=True, repeated=repeated) for repeated in (True, False))
    assert replicated(together, "a").means().min() == pytest.approx(1)
    assert replicated(apart, "a").means().mean() < 0.9


def test_a_prediction_is_as_good_as_itself_without_any_doubt():
    samples, _ = two_predictions(torch.Generator().manual_seed(0), (0.5, 0.5), True)
    low, high = difference_interval(replicated(samples, "a"), replicated(samples, "a"))
    assert (low.item(), high.item()) == (0, 0)


@pytest.fixture
def evaluated():
    """An attribution, the same with noise, and their truth."""
    generator = torch.Generator().manual_seed(0)
    responses = normal(generator, 1, 3, 20) + 0.5 * normal(generator, 8, 3, 20)
    baseline = normal(generator, 8, 3)
    removed = tuple(tuple(sorted(torch.randperm(20, generator=generator)[:4].tolist())) for _ in range(12))
    runs = tuple(f"seed-{run:04d}" for run in range(8))
    good = Attribution(baseline, responses, runs, (0, 1, 2))
    effects = torch.stack([good.responses[..., list(subset)].sum(2).mean(0) for subset in removed])
    measurements, seeds = effects[:, None] + normal(generator, 12, 6, 3), tuple(range(90, 96))
    truth = GroundTruth(measurements, normal(generator, 6, 3), removed, (0, 1, 2), seeds, seeds)
    noise = 2 * normal(generator, 1, 3, 20) + normal(generator, 8, 3, 20)
    return good, replace(good, responses=responses + noise), truth


def test_differences_are_those_of_the_scores(evaluated):
    good, noisy, truth = evaluated
    first, second = (evaluate(each, truth, replicates=200) for each in (good, noisy))
    found = compare(first, second)
    assert list(found) == ["mean", "variance", "wasserstein"]
    for name, each in found.items():
        assert each.gain == first.scores[name].score - second.scores[name].score
        assert each.low < each.high
        back = compare(second, first)[name]
        assert (back.low, back.high) == (pytest.approx(-each.high), pytest.approx(-each.low))
    assert found["mean"].clear
    assert found["mean"].low < found["mean"].gain < found["mean"].high


def test_without_draws_there_is_no_interval(evaluated):
    good, noisy, truth = evaluated
    found = compare(*(evaluate(each, truth, ["mean"], replicates=0) for each in (good, noisy)))["mean"]
    assert found.gain > 0
    assert np.isnan([found.low, found.high]).all()
    assert not found.clear


def test_evaluations_of_another_truth_or_other_draws_are_refused(evaluated):
    good, noisy, truth = evaluated
    first = evaluate(good, truth, ["mean"], replicates=20)
    other_truth = replace(truth, baseline=truth.baseline + 1)
    with pytest.raises(AttributionError, match="differ in their ground truth"):
        compare(first, evaluate(noisy, other_truth, ["mean"], replicates=20))
    with pytest.raises(AttributionError, match="differ in their confidence"):
        compare(first, evaluate(noisy, truth, ["mean"], replicates=20, confidence=0.9))
    for settings in ({"replicates": 30}, {"replicates": 20, "seed": 1}):
        with pytest.raises(AttributionError, match="have different draws"):
            compare(first, evaluate(noisy, truth, ["mean"], **settings))


def test_an_evaluation_is_written_without_its_draws(evaluated):
    good, _, truth = evaluated
    content = json.loads(json.dumps(evaluate(good, truth, ["mean"], replicates=20).content()))
    assert "replicates" not in content["scores"]["mean"]
    assert content["run_names"] == list(good.runs)
