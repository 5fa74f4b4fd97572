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
    responses = torch.stack([0.3 * x - 0.5, -0.4 * x, -0.2 * x], -1)
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


def test_what_is_not_suggested_is_verified_on_request():
    x = torch.linspace(-1, 1, 12, dtype=torch.float64)[:, None]
    noise = torch.randn(12, 1, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    runs = tuple(f"seed-{s:04d}" for s in range(12))
    unclear = suggest_removals(Attribution(x, noise, runs, (5,)), "improve_mean", caution=0)
    assert unclear.removals
    assert not unclear.removed
    data = replace(truth(range(9), range(9)), removed=((1, 2), tuple(sorted(unclear.sets[0]))))
    with pytest.raises(AttributionError, match=r"to verify .No removal is shown to help: .* Give step=1 to"):
        verify(unclear, data)
    found = verify(unclear, data, step=1)
    assert found.effect == pytest.approx(float((data.measurements[1] - data.baseline).mean()), rel=1e-9)


def test_a_spread_s_change_is_relative_and_its_interval_holds(suggestion):
    """Retrained with 0.7 of the standard deviation and other seeds; by simulation."""
    spread = replace(suggestion, goal="reduce_variance")
    generator, held = torch.Generator().manual_seed(1), 0
    for _ in range(300):
        real = 0.7 * torch.randn(2, 12, 1, generator=generator, dtype=torch.float64)
        baseline = torch.randn(16, 1, generator=generator, dtype=torch.float64)
        data = GroundTruth(real, baseline, ((2,), (0,)), (5,), tuple(range(12)), tuple(range(20, 36)))
        found = verify(spread, data, step=1)
        assert found.effect == pytest.approx(float(real[1].std() / baseline.std()) - 1, rel=1e-9)
        held += found.low <= -0.3 <= found.high
    assert 0.92 <= held / 300 <= 0.99  # 0.95 is found to within 0.025
