"""Standard errors of differences that jump when a run is left out."""

import pytest
import torch

from lightning_dtda.statistics.differences import Mean, Quantile, Variance
from lightning_dtda.statistics.resampling import bootstrap, jackknife
from tests.simulated import attribution_of

GENERATOR = torch.Generator().manual_seed(0)


def test_the_bootstrap_agrees_with_the_jackknife_where_both_hold():
    samples = torch.randn(60, 50, generator=GENERATOR, dtype=torch.float64)
    for difference in (Mean(), Variance()):
        by_draws = bootstrap(difference, torch.zeros_like(samples), samples, replicates=2000)
        ratio = (by_draws / jackknife(difference, torch.zeros_like(samples), samples)).mean()
        assert 0.9 < ratio < 1.1


def test_the_error_of_a_median_is_that_of_a_median():
    # of normal samples, the square root of pi / 2 times that of the mean
    samples = torch.randn(200, 1, 300, generator=GENERATOR)
    large = attribution_of(torch.zeros(200, 1), samples)
    ratio = (large.standard_error(Mean("median")) / large.standard_error("mean")).mean().item()
    assert ratio == pytest.approx((torch.pi / 2) ** 0.5, rel=0.1)


@pytest.mark.parametrize("difference", [Quantile(0.5), Quantile(0.9), Mean("median")], ids=lambda each: each.name)
def test_the_error_of_order_statistics_is_the_spread_over_repeated_ensembles(difference):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(20, 1000, generator=generator, dtype=torch.float64)
    y = 1.3 * x + 1.0 + 0.2 * torch.randn(20, 1000, generator=generator, dtype=torch.float64)
    spread, (estimated, jackknifed) = difference(x, y).std(), (f(difference, x, y) for f in (bootstrap, jackknife))
    # why not by the jackknife: it spreads by more than half of itself, and lies twice too high for a median
    assert jackknifed.std() > 2 * estimated.std()
    assert difference.standard_error(x, y).mean() / spread == pytest.approx(1, abs=0.15)
