"""Real effects of suggested removals, against SciPy."""

from dataclasses import replace

import pytest
import torch
from scipy import stats

from lightning_dtda import Attribution, GroundTruth, suggest_removals
from lightning_dtda.errors import AttributionError
from lightning_dtda.evaluation import verify


@pytest.fixture
def suggestion():
    x = torch.linspace(-1, 1, 12, dtype=torch.float64)[:, None]
    responses = torch.stack([0.3 * x - 0.1, -0.4 * x, -0.2 * x], -1)
    attribution = Attribution(x, responses, tuple(f"seed-{s:04d}" for s in range(12)), (5,))
    return suggest_removals(attribution, "improve_mean", k=1, caution=0)


def truth(seeds, baseline_seeds):
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(2, len(seeds), 1, generator=generator, dtype=torch.float64)
    baseline = torch.randn(len(baseline_seeds), 1, generator=generator, dtype=torch.float64) * 2 + 1
    return GroundTruth(real, baseline, ((2,), (0,)), (5,), tuple(seeds), tuple(baseline_seeds))


def test_the_mean_s_interval_is_welchs_for_other_seeds(suggestion):
    assert suggestion.removed == (0,)
    found, real = verify(suggestion, data := truth(range(9), range(20, 35))), data.measurements[1, :, 0]
    expected = stats.ttest_ind(real, data.baseline[:, 0], equal_var=False).confidence_interval(0.95)
    assert (found.low, found.high) == (pytest.approx(expected.low, rel=1e-10), pytest.approx(expected.high, rel=1e-10))
    assert found.effect == pytest.approx(float(real.mean() - data.baseline.mean()), rel=1e-12)


def test_the_mean_s_interval_is_that_of_pairs_for_the_same_seeds(suggestion):
    found, real = verify(suggestion, data := truth(range(9), range(9)), 0.9), data.measurements[1, :, 0]
    expected = stats.ttest_rel(real, data.baseline[:, 0]).confidence_interval(0.9)
    assert (found.low, found.high) == (pytest.approx(expected.low, rel=1e-10), pytest.approx(expected.high, rel=1e-10))


def test_a_truth_of_other_sets_or_with_missing_trainings_is_refused(suggestion):
    complete = truth(range(9), range(9))
    with pytest.raises(AttributionError, match="is the set of the 1 suggested examples"):
        verify(suggestion, replace(complete, removed=((2,), (1,))))
    missing = complete.measurements.clone()
    missing[1, 3] = torch.nan
    with pytest.raises(AttributionError, match="8 of the 9 trainings without"):
        verify(suggestion, replace(complete, measurements=missing))
