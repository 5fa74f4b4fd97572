"""Samples at the edge: without spread, with one run that makes all of it, with NaN, or too few."""

import math

import pytest
import torch

from lightning_dtda.attribution.trust import chaotic
from lightning_dtda.statistics.differences import Energy, GaussianKL, Mean, Spread, Tail, Wasserstein
from lightning_dtda.statistics.power import retrainings_needed, runs_for_significance
from lightning_dtda.statistics.reliability import runs_for_stable_top, top_agreement
from lightning_dtda.statistics.significance import discoveries


def one_run_moves(runs, columns):
    predicted = torch.zeros(runs, columns, dtype=torch.float64)
    predicted[3] = torch.rand(columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.zeros_like(predicted), predicted


@pytest.mark.parametrize("difference", [Spread(), Wasserstein(), Energy(), GaussianKL()], ids=lambda d: d.name)
@pytest.mark.parametrize("runs", [12, 21, 32])
def test_a_single_run_that_makes_all_of_the_spread_shows_nothing(difference, runs):
    x, y = one_run_moves(runs, 100)
    for baseline in (x, y / 2):
        p = difference.p_values(baseline, y)
        assert not p.isnan().any()
        assert not discoveries(p, 0.05).any()


def test_an_interval_of_what_is_unknown_is_everything():
    low, high = Spread().interval(*one_run_moves(12, 3), 0.95)
    assert low.isneginf().all()
    assert high.isposinf().all()
    assert Spread().shown(2.5e3) == math.inf


@pytest.mark.parametrize("swap", [False, True])
def test_where_x_or_y_has_no_spread_the_distance_has_an_interval_like_its_p_value(swap):
    generator = torch.Generator().manual_seed(1)
    moving = 0.5 + torch.randn(12, 200, generator=generator, dtype=torch.float64)
    samples = (moving, torch.zeros_like(moving)) if swap else (torch.zeros_like(moving), moving)
    low, high = Wasserstein().interval(*samples, 0.95)
    assert (low <= high).all()
    assert torch.equal(low > 0, Wasserstein().p_values(*samples) < 0.05)


def test_nan_stays_nan():
    x = torch.randn(8, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    y = 2 * x
    y[5, 1] = torch.nan
    for difference in (Mean(), Spread(), GaussianKL()):
        assert difference(x, y).isnan().tolist() == [False, True]
        assert difference.standard_error(x, y).isnan().tolist() == [False, True]
    assert Spread().standard_error(x[:1], y[:1]).isnan().all()
    assert Spread().p_values(x[:1], y[:1]).isnan().all()


def test_a_run_whose_norm_is_nan_hides_no_other():
    norms = [1.0, 1.1, 0.9, 1.2, 1.0, 0.8, 1.1, 30.0, math.nan]
    assert chaotic({str(run): norm for run, norm in enumerate(norms)}) == ["7", "8"]


@pytest.mark.parametrize("runs", [5, 6, 10, 20])
def test_the_trimmed_mean_rejects_no_more_often_than_it_says(runs):
    y = torch.randn(runs, 20_000, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    p = Mean("trimmed").p_values(torch.zeros_like(y), y)
    assert (p < 0.05).double().mean() < 0.065  # as Student's t of a trimmed mean is known to, with few Gaussian samples
    assert (p < 0.001).double().mean() < 0.0025


def test_one_outlying_run_hardly_moves_the_error_of_the_trimmed_mean():
    y = torch.tensor([0.0, 1.0, -1.0, 0.5, 90.0], dtype=torch.float64)
    assert Mean("trimmed").standard_error(torch.zeros(5, dtype=torch.float64), y) < 1


@pytest.mark.parametrize("level", [0.05, 0.01, 0.001])
def test_with_the_fewest_runs_an_exchange_can_reach_the_level(level):
    runs = Tail().fewest_runs(level)
    x = torch.arange(runs, dtype=torch.float64)
    assert Tail().p_values(x, x + 100) <= level
    assert Tail().p_values(x[1:], x[1:] + 100) > level


def test_an_effect_of_exactly_zero_may_still_be_one():
    y = torch.tensor([0.5, -0.5, 0.25, -0.25, 0.0], dtype=torch.float64)
    low, estimate, high = retrainings_needed(Mean(), torch.zeros(5).double(), y, 0.8, 0.05, 0.8)
    assert math.isfinite(low)
    assert estimate.isinf()
    assert high.isinf()


@pytest.mark.parametrize("difference", [Mean(), Mean("trimmed"), Mean("median")], ids=lambda d: d.name)
def test_what_is_just_significant_needs_more_runs_to_be_found_again(difference):
    _, estimate, _ = runs_for_significance(difference, torch.tensor(0.01), 20, 0.01, 0.8, 0.8)
    assert estimate > 20


def test_influences_of_zero_are_no_stable_top():
    assert top_agreement(lambda runs: torch.zeros(1, 1000), 10, 10) == 0
    assert not runs_for_stable_top(torch.tensor([0.85]), 10, 9, 10, 0.5).isnan()
