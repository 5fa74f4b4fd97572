"""Whether runs agree: against SciPy, and against what other seeds would say."""

import pytest
import torch
from scipy.stats import spearmanr

from lightning_dtda.errors import AttributionError
from lightning_dtda.statistics.correlation import correlations
from lightning_dtda.statistics.reliability import SPLITS, halves, reliability, spearman_brown, split_half
from tests.simulated import attribution_of

GENERATOR = torch.Generator().manual_seed(0)


@pytest.fixture
def attribution():
    """Nine runs that share a signal, each with noise of half its size."""
    signal = torch.randn(1, 3, 40, generator=GENERATOR)
    return attribution_of(torch.zeros(9, 3), signal + 0.5 * torch.randn(9, 3, 40, generator=GENERATOR))


@pytest.mark.parametrize("values", [50, 5], ids=["few ties", "ties"])
def test_reliability_is_spearmans_correlation_of_halves(values):
    influences = torch.randint(values, (6, 2, 40), generator=torch.Generator().manual_seed(0)).double()
    generator, expected = torch.Generator().manual_seed(0), []
    for _ in range(SPLITS):
        halved = [influences[half].mean(0) for half in halves(6, generator)]
        expected.append([spearmanr(*pair).statistic for pair in zip(*halved, strict=True)])
    rho = torch.tensor(expected, dtype=torch.float64).mean(0).clamp_min(0)
    found = reliability(lambda half: influences[half].mean(0), 6)
    torch.testing.assert_close(found, 2 * rho / (1 + rho), rtol=1e-12, atol=1e-12)


def test_reliability_is_that_of_spearman_and_brown(attribution):
    signal, noise = 1.0, 0.5
    runs = 9
    # correlation of two means of half the runs, carried to all of them
    expected = signal**2 / (signal**2 + noise**2 / runs)
    assert attribution.reliability().mean().item() == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize("runs", [5, 8])
def test_it_is_the_correlation_with_as_many_other_runs_also_of_an_odd_number(runs):
    generator = torch.Generator().manual_seed(0)
    effects = torch.randn(1, 300, 200, generator=generator, dtype=torch.float64)
    one, other = (effects + 2 * torch.randn(runs, 300, 200, generator=generator, dtype=torch.float64) for _ in range(2))
    expected = correlations(one.mean(0), other.mean(0)).mean()
    found = reliability(lambda half: one[half].mean(0), runs).mean()
    # 300 queries know both to 0.003; halves of 5 that counted as halves of 4 would be 0.05 too low
    assert found.item() == pytest.approx(expected.item(), abs=0.015)


def test_influences_that_are_all_equal_rank_nothing():
    equal = torch.ones(8, 2, 30)
    assert reliability(lambda half: equal[half].mean(0), 8).tolist() == [0, 0]
    assert split_half(lambda half: equal[half].mean(0), (8,)).isnan().all()


def test_twice_the_runs_carry_as_spearman_and_brown_say():
    assert spearman_brown(torch.tensor([0.5, 1.0, -0.2]), 2).tolist() == pytest.approx([2 / 3, 1, 0])


def test_noise_is_not_reliable():
    responses = torch.randn(12, 2, 400, generator=GENERATOR)
    pure = attribution_of(torch.zeros(12, 2), responses)
    assert (pure.reliability() < 0.15).all()


def test_three_runs_have_no_halves(attribution):
    few = attribution_of(attribution.baseline[:3], attribution.responses[:3])
    with pytest.raises(AttributionError, match="needs 4 runs; there are 3"):
        few.reliability()
