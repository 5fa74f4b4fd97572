"""Differences against SciPy and NumPy, standard errors against simulation."""

import numpy as np
import pytest
import torch
from scipy.stats import wasserstein_distance

from lightning_dtda.attribution.differences import Mean, Variance, Wasserstein, jackknife, resolve_difference
from lightning_dtda.errors import AttributionError

GENERATOR = torch.Generator().manual_seed(0)
BASELINE = torch.randn(12, 1, generator=GENERATOR, dtype=torch.float64)
PREDICTED = BASELINE + 0.3 * torch.randn(12, 5, generator=GENERATOR, dtype=torch.float64)


def test_mean_and_variance_are_those_of_numpy():
    x, y = BASELINE.numpy(), PREDICTED.numpy()
    np.testing.assert_allclose(Mean()(BASELINE, PREDICTED), x.mean(0) - y.mean(0), rtol=1e-12)
    np.testing.assert_allclose(Variance()(BASELINE, PREDICTED), y.var(0, ddof=1) - x.var(0, ddof=1), rtol=1e-12)


def test_wasserstein_is_the_best_pairing():
    from scipy.optimize import linear_sum_assignment

    for column in PREDICTED.T.numpy():
        cost = (BASELINE.numpy() - column) ** 2
        best = np.sqrt(cost[linear_sum_assignment(cost)].mean())
        assert Wasserstein()(BASELINE[:, 0], torch.tensor(column)).item() == pytest.approx(best, rel=1e-12)


def test_wasserstein_bounds_scipys_one_distance():
    for column, found in zip(PREDICTED.T.numpy(), Wasserstein()(BASELINE, PREDICTED), strict=True):
        assert found >= wasserstein_distance(BASELINE[:, 0].numpy(), column) - 1e-12


def test_wasserstein_of_a_shift_is_the_shift():
    assert Wasserstein()(BASELINE, BASELINE + 2.5).item() == pytest.approx(2.5, rel=1e-12)


def test_jackknife_of_the_mean_is_its_usual_standard_error():
    shifts = (BASELINE - PREDICTED).numpy()
    expected = shifts.std(0, ddof=1) / np.sqrt(len(shifts))
    np.testing.assert_allclose(jackknife(Mean(), BASELINE, PREDICTED), expected, rtol=1e-10)


@pytest.mark.parametrize("difference", [Mean(), Variance(), Wasserstein()], ids=lambda d: d.name)
def test_jackknife_is_the_spread_over_repeated_ensembles(difference):
    # 2,000 ensembles of 20 runs; an effect well above its error, where W_2 is smooth
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(20, 2000, generator=generator, dtype=torch.float64)
    y = 1.3 * x + 1.0 + 0.2 * torch.randn(20, 2000, generator=generator, dtype=torch.float64)
    spread = difference(x, y).std()
    estimated = jackknife(difference, x, y).mean()
    # the jackknife is biased upwards a little (Efron and Stein, 1981); the spread of 2,000 is known to 1.6 %
    assert 0.9 * spread < estimated < 1.2 * spread


def test_too_few_runs_have_no_standard_error():
    assert jackknife(Mean(), BASELINE[:1], PREDICTED[:1]).isnan().all()
    assert jackknife(Variance(), BASELINE[:2], PREDICTED[:2]).isnan().all()
    assert jackknife(Variance(), BASELINE[:3], PREDICTED[:3]).isfinite().all()


class Median:
    name = "median"
    least_runs = 1

    def __call__(self, baseline, predicted):
        return baseline.median(0).values - predicted.median(0).values


def test_a_new_difference_is_found_by_its_import_path():
    assert resolve_difference(f"{__name__}.Median").name == "median"


@pytest.mark.parametrize("name", ["mode", "no.such.Class", f"{__name__}.Mode"])
def test_an_unknown_difference_is_refused_with_the_known_ones(name):
    with pytest.raises(AttributionError, match="mean, variance, wasserstein"):
        resolve_difference(name)
