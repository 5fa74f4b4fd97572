"""Differences against SciPy and NumPy, standard errors against simulation."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import energy_distance, wasserstein_distance

from lightning_dtda import statistics
from lightning_dtda.errors import AttributionError
from lightning_dtda.statistics.differences import (
    Difference,
    Energy,
    GaussianKL,
    Mean,
    Quantile,
    Tail,
    Variance,
    Wasserstein,
    resolve_difference,
)
from lightning_dtda.statistics.resampling import jackknife

GENERATOR = torch.Generator().manual_seed(0)
BASELINE = torch.randn(12, 1, generator=GENERATOR, dtype=torch.float64)
PREDICTED = BASELINE + 0.3 * torch.randn(12, 5, generator=GENERATOR, dtype=torch.float64)


def test_mean_and_variance_are_those_of_numpy():
    x, y = BASELINE.numpy(), PREDICTED.numpy()
    np.testing.assert_allclose(Mean()(BASELINE, PREDICTED), y.mean(0) - x.mean(0), rtol=1e-12)
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


def test_energy_is_scipys_and_the_mean_distances_of_its_definition():
    x = BASELINE[:, 0].numpy()
    for column, found in zip(PREDICTED.T.numpy(), Energy()(BASELINE, PREDICTED), strict=True):
        assert found.item() == pytest.approx(energy_distance(x, column), rel=1e-12)
        within = [np.abs(each[:, None] - each).mean() for each in (x, column)]
        assert found.item() ** 2 == pytest.approx(2 * np.abs(x[:, None] - column).mean() - sum(within), rel=1e-10)


def test_samples_may_be_of_different_sizes():
    generator = torch.Generator().manual_seed(3)
    x, y = (torch.randn(size, 2, generator=generator, dtype=torch.float64) for size in (6, 4))
    a, b = x.numpy(), y.numpy()
    ratio = b.var(0, ddof=1) / a.var(0, ddof=1)
    divergence = (ratio - 1 - np.log(ratio) + (b.mean(0) - a.mean(0)) ** 2 / a.var(0, ddof=1)) / 2
    np.testing.assert_allclose(Mean()(x, y), b.mean(0) - a.mean(0), rtol=1e-12)
    np.testing.assert_allclose(Variance()(x, y), b.var(0, ddof=1) - a.var(0, ddof=1), rtol=1e-12)
    np.testing.assert_allclose(GaussianKL()(x, y), divergence, rtol=1e-12)
    np.testing.assert_allclose(Quantile(0.3)(x, y), np.quantile(b, 0.3, 0) - np.quantile(a, 0.3, 0), rtol=1e-12)
    # a sample twice over has the same tail
    np.testing.assert_allclose(Tail(0.6)(x, y), Tail(0.6)(x.repeat(2, 1), y.repeat(3, 1)), rtol=1e-12)


def test_distances_of_samples_of_different_sizes_are_scipys():
    generator = torch.Generator().manual_seed(3)
    x, y = (torch.randn(size, 2, generator=generator, dtype=torch.float64) for size in (7, 5))
    for column, found in enumerate(Energy()(x, y).tolist()):
        assert found == pytest.approx(energy_distance(x[:, column], y[:, column]), rel=1e-12)
    # scipy has W_1 only: equal to W_2 squared where samples are of zeros and ones
    ones, zeros = torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0])
    assert Wasserstein()(ones, zeros).item() ** 2 == pytest.approx(wasserstein_distance(ones, zeros), rel=1e-6)


def test_energy_of_equal_samples_is_zero_and_ties_do_no_harm():
    x = torch.tensor([1.0, 1.0, 2.0])
    assert Energy()(x, x[[2, 0, 1]]).item() == 0
    y = torch.tensor([1.0, 2.0, 2.0])
    assert Energy()(x, y).item() == pytest.approx(energy_distance(x.numpy(), y.numpy()), rel=1e-6)  # single precision


@pytest.mark.parametrize("p", [0.0, 0.25, 0.9, 1.0])
def test_quantile_is_that_of_numpy(p):
    expected = np.quantile(PREDICTED.numpy(), p, axis=0) - np.quantile(BASELINE.numpy(), p, axis=0)
    np.testing.assert_allclose(Quantile(p)(BASELINE, PREDICTED), expected, rtol=1e-12)


@pytest.mark.parametrize("side", ["upper", "lower"])
@pytest.mark.parametrize("level", [0.0, 0.5, 0.77, 0.95])
def test_tail_is_the_integral_of_the_quantile_function(level, side):
    # 12 runs: the empirical quantile function is constant between multiples of 1 / 12; midpoints of a grid that
    # all borders are on integrate it exactly
    points = level + (1 - level) * (np.arange(1200 * 100) + 0.5) / (1200 * 100)
    points = points if side == "upper" else 1 - points

    def shortfall(samples):
        return np.quantile(samples, points, axis=0, method="inverted_cdf").mean(0)

    expected = shortfall(PREDICTED.numpy()) - shortfall(BASELINE.numpy())
    # a border that is not on the grid for 0.77 costs at most one point's share
    np.testing.assert_allclose(Tail(level, side)(BASELINE, PREDICTED), expected, atol=1e-4)


def test_tail_from_level_zero_is_the_mean():
    torch.testing.assert_close(Tail(0)(BASELINE, PREDICTED), Mean()(BASELINE, PREDICTED))


def test_gaussian_kl_is_that_of_torch_distributions():
    normals = [torch.distributions.Normal(each.mean(0), each.std(0)) for each in (PREDICTED, BASELINE)]
    expected = torch.distributions.kl_divergence(*normals)
    torch.testing.assert_close(GaussianKL()(BASELINE, PREDICTED), expected, rtol=1e-10, atol=0)


def test_gaussian_kl_of_a_degenerate_distribution_is_infinite_unless_nothing_changes():
    constant, spread = torch.ones(4), torch.tensor([0.0, 1.0, 2.0, 3.0])
    assert GaussianKL()(constant, constant).item() == 0
    assert GaussianKL()(constant, constant + 1).item() == torch.inf
    assert GaussianKL()(constant, spread).item() == torch.inf
    assert GaussianKL()(spread, constant).item() == torch.inf


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (lambda: Quantile(1.5), "between 0 and 1"),
        (lambda: Tail(1.0), "less than 1"),
        (lambda: Tail(side="left"), "upper, lower"),  # type: ignore[arg-type]
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong, match):
    with pytest.raises(AttributionError, match=match):
        wrong()


def test_jackknife_of_the_mean_is_its_usual_standard_error():
    shifts = (BASELINE - PREDICTED).numpy()
    expected = shifts.std(0, ddof=1) / np.sqrt(len(shifts))
    np.testing.assert_allclose(jackknife(Mean(), BASELINE, PREDICTED), expected, rtol=1e-10)


SMOOTH = [Mean(), Variance(), Wasserstein(), Energy(), Tail(0.5), GaussianKL()]


@pytest.mark.parametrize("difference", SMOOTH, ids=lambda d: d.name)
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


class Median(Difference):
    name, formula, unit = "median", "median Y - median X", "the {measurement}'s unit"
    meaning = "change of the median {measurement}"

    def __call__(self, baseline, predicted):
        return predicted.median(0).values - baseline.median(0).values


def test_a_new_difference_is_found_by_its_import_path():
    assert resolve_difference(f"{__name__}.Median").name == "median"


@pytest.mark.parametrize("name", ["mode", "no.such.Class", f"{__name__}.Mode"])
def test_an_unknown_difference_is_refused_with_the_known_ones(name):
    with pytest.raises(AttributionError, match="mean, spread, variance, wasserstein, energy"):
        resolve_difference(name)


def test_leaving_runs_out_by_the_formula_is_leaving_them_out():
    x, y = 5 + torch.randn(9, 1, dtype=torch.float64), 5 + torch.randn(9, 4, dtype=torch.float64)
    rows = [[row for row in range(9) if row != left_out] for left_out in range(9)]
    expected = torch.stack([y[some].var(0) - x[some].var(0) for some in rows])
    torch.testing.assert_close(Variance().leave_one_out(x, y), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("size", [1.0, 0.1, 1e-9])
def test_the_distance_without_each_run_is_that_of_the_others(size):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, 2, 1, generator=generator, dtype=torch.float64)
    y = x + size * torch.randn(9, 2, 40, generator=generator, dtype=torch.float64)
    y[:3, 0, :5], y[:, 1, :5] = y[3, 0, :5], 7.0  # ties
    expected = torch.stack(list(Difference.leave_one_out(Wasserstein(), x, y)))
    torch.testing.assert_close(Wasserstein().leave_one_out(x, y), expected, rtol=1e-10, atol=1e-10 * size)


def test_the_room_of_samples_needs_little_of_the_package():
    root = Path(statistics.__file__).parent
    found = {
        name
        for path in root.rglob("*.py")
        for name in re.findall(r"^\s*(?:from|import) (lightning\S*)", path.read_text(), re.MULTILINE)
    }
    others = {name for name in found if not name.startswith("lightning_dtda.statistics")}
    assert others <= {"lightning_dtda.errors", "lightning_dtda.text", "lightning_dtda.units"}
