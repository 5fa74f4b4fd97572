"""Variance split by source: against the analysis of variance by hand, simulated parts, and the test of one source."""

import numpy as np
import pytest
import torch
from scipy import stats

from benchmarks.variance_by_source import PARTS_OF_THE_MEAN, coverage, found, of_the_mean
from lightning_dtda.errors import AttributionError
from lightning_dtda.statistics import SourceVariance, resolve_difference
from lightning_dtda.statistics.variance_components import (
    Crossed,
    component_changes,
    component_intervals,
    components,
    mean_variance,
)


def seeds(*sizes, names=("initialisation", "order", "noise")):
    grid = torch.cartesian_prod(*map(torch.arange, sizes))
    return dict(zip(names, grid.T.tolist(), strict=False))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_two_sources_are_split_as_by_the_analysis_of_variance():
    y = normal(5, 4).numpy()
    rows, columns, mean = y.mean(1), y.mean(0), y.mean()
    of_rows = 4 * ((rows - mean) ** 2).sum() / 4
    of_columns = 5 * ((columns - mean) ** 2).sum() / 3
    rest = ((y - rows[:, None] - columns + mean) ** 2).sum() / 12
    expected = [(of_rows - rest) / 4, (of_columns - rest) / 5, rest]
    split = components(Crossed.of(seeds(5, 4)), torch.tensor(y).flatten())
    np.testing.assert_allclose(split.numpy(), expected, rtol=1e-12)


def test_the_order_of_the_runs_does_not_matter():
    grid, y = seeds(5, 4), normal(20, 3)
    shuffled = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    moved = {source: [of_source[n] for n in shuffled] for source, of_source in grid.items()}
    torch.testing.assert_close(components(Crossed.of(moved), y[shuffled]), components(Crossed.of(grid), y))


def test_the_parts_of_three_sources_are_found_without_bias():
    sizes, ensembles = (4, 3, 5), 20_000
    deviations = {(0,): 1.0, (1,): 0.7, (2,): 0.0, (0, 1): 0.5, (0, 2): 0.4, (1, 2): 0.6, (0, 1, 2): 0.3}
    y = torch.zeros(*sizes, ensembles, dtype=torch.float64)
    for number, (axes, deviation) in enumerate(deviations.items()):
        shape = [size if axis in axes else 1 for axis, size in enumerate(sizes)]
        y = y + deviation * normal(*shape, ensembles, seed=number)
    crossed = Crossed.of(seeds(*sizes))
    assert crossed.effects == tuple(deviations)
    assert crossed.parts[3:] == ("initialisation and order", "initialisation and noise", "order and noise", "rest")
    split = components(crossed, y.flatten(0, 2))
    error = split.std(1) / ensembles**0.5
    expected = torch.tensor([deviation**2 for deviation in deviations.values()], dtype=torch.float64)
    assert ((split.mean(1) - expected).abs() < 4 * error).all()


def test_seeds_with_missing_runs_are_left_out():
    grid, y = seeds(5, 4), normal(20)
    kept = [n for n in range(20) if n not in (6, 7)]  # initialisation 1 with orders 2 and 3
    damaged = {source: [of_source[n] for n in kept] for source, of_source in grid.items()}
    crossed = Crossed.of(damaged)
    assert crossed.shape == (4, 4)
    whole = [n for n in range(20) if grid["initialisation"][n] != 1]
    complete = {source: [of_source[n] for n in whole] for source, of_source in grid.items()}
    torch.testing.assert_close(components(crossed, y[kept]), components(Crossed.of(complete), y[whole]))


@pytest.mark.parametrize("wrong", [{}, {"order": [0, 1, 2]}, {"initialisation": [0, 0], "order": [0, 1]}, seeds(3, 1)])
def test_what_is_not_crossed_is_refused(wrong):
    with pytest.raises(AttributionError, match=r"--seeds\.initialisation 8 --seeds\.order 8"):
        Crossed.of(wrong)


def test_a_change_is_the_difference_of_two_components():
    crossed, x, y = Crossed.of(seeds(4, 3, 3)), normal(36), normal(36, seed=1)
    change = components(crossed, y) - components(crossed, x)
    for effect in range(len(crossed.effects)):
        torch.testing.assert_close(component_changes(crossed, x, y, effect)[0], change[effect])


def test_without_other_effects_the_test_is_that_of_pitman_and_morgan():
    # every run of an initialisation measures the same, so the initialisations are independent samples
    x, y = normal(9), 0.9 * normal(9) + 0.6 * normal(9, seed=1)
    test = SourceVariance("initialisation").of_runs(seeds(9, 3))
    p = test.p_values(x.repeat_interleave(3), y.repeat_interleave(3))
    expected = stats.pearsonr((y - x).numpy(), (y + x).numpy()).pvalue
    assert float(p) == pytest.approx(expected, rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["Gaussian", "Student's t", "exponential"])
def test_intervals_hold_the_part(shape):
    least = {"Gaussian": 0.95, "Student's t": 0.90, "exponential": 0.86}[shape]
    for deviations in ((1.0, 1.0, 0.5), (0.3, 1.0, 1.0)):
        assert coverage(shape, (8, 8), deviations, 600) > least - 0.02  # two standard errors of 600 ensembles


@pytest.mark.parametrize("grid", [(5, 4), (8, 8)])
@pytest.mark.parametrize("factors", [(1.0, 1.0, 1.0), (1.0, 1.4, 1.4)])
def test_a_change_of_other_parts_is_not_found_in_this_one(grid, factors):
    for deviations in ((1.0, 1.0, 0.5), (0.3, 1.0, 1.0), (0.0, 1.0, 1.0)):
        assert found("Gaussian", grid, deviations, factors, 2000) < 0.065


def test_a_change_of_this_part_is_found_the_more_seeds_the_better():
    shares = [found("Gaussian", grid, (1.0, 1.0, 0.5), (1.4, 1.0, 1.0), 1000) for grid in ((5, 4), (8, 8), (16, 16))]
    assert shares[0] > 0.2
    assert shares[1] > 0.5
    assert shares[2] > 0.9


def test_two_seeds_of_a_source_are_too_few_to_test():
    test = SourceVariance("initialisation").of_runs(seeds(2, 6))
    assert test.p_values(normal(12), normal(12, seed=1)).isnan()
    assert not SourceVariance("order").of_runs(seeds(2, 6)).p_values(normal(12), normal(12, seed=1)).isnan()


def test_nothing_changes_where_nothing_changes():
    test, x = SourceVariance("order").of_runs(seeds(3, 4)), normal(12)
    assert float(test(x, x)) == 0
    assert float(test.p_values(x, x)) == 1


def test_intervals_do_not_depend_on_the_sign():
    crossed, x = Crossed.of(seeds(8, 8)), normal(64, 5).exp()
    torch.testing.assert_close(component_intervals(crossed, x), component_intervals(crossed, -x))


def test_many_queries_have_the_intervals_that_each_has():
    crossed, x = Crossed.of(seeds(3, 4)), normal(12, 300)
    torch.testing.assert_close(component_intervals(crossed, x)[..., 299:], component_intervals(crossed, x[:, 299:]))


def test_an_interval_of_constant_samples_is_zero():
    low, high = component_intervals(Crossed.of(seeds(3, 4)), torch.ones(12, 1))
    assert (low == 0).all()
    assert (high == 0).all()


def test_a_part_is_found_by_name_but_only_in_crossed_runs():
    difference = resolve_difference("order_variance")
    with pytest.raises(AttributionError, match="each with the seeds of its sources"):
        difference(normal(12), normal(12, seed=1))
    with pytest.raises(AttributionError, match=r"no part 'noise'\. These runs vary initialisation, order"):
        resolve_difference("noise_variance").of_runs(seeds(3, 4))


@pytest.mark.parametrize("deviations", PARTS_OF_THE_MEAN)
@pytest.mark.parametrize("grid", [(2, 8), (4, 4), (4, 16), (8, 8)])
def test_the_mean_of_crossed_runs_is_tested_at_its_level_and_is_surer_than_that_of_independent_ones(deviations, grid):
    size, _, error = of_the_mean("Gaussian", grid, deviations, 2000)
    assert size < 0.065  # three standard errors of 2000 ensembles
    assert error < 1
    if deviations == (1, 0, 0.3) and grid != (2, 8):
        assert size > 0.03  # where one source dominates, the test is not timid


def test_the_variance_of_a_mean_over_three_sources_has_little_bias():
    sizes, ensembles = (4, 3, 5), 20_000
    effects = {(0,): 1.0, (1,): 0.7, (2,): 0.8, (0, 1): 0.5, (0, 2): 0.6, (1, 2): 0.6, (0, 1, 2): 0.3}
    y, expected = torch.zeros(*sizes, ensembles, dtype=torch.float64), 0.0
    for number, (axes, deviation) in enumerate(effects.items()):
        shape = [size if axis in axes else 1 for axis, size in enumerate(sizes)]
        y = y + deviation * normal(*shape, ensembles, seed=number)
        expected += deviation**2 / np.prod(shape)
    found = mean_variance(Crossed.of(seeds(*sizes)), y.flatten(0, 2), seeds(*sizes)).mean()
    assert y.mean((0, 1, 2)).var() == pytest.approx(expected, rel=0.05)
    assert found == pytest.approx(expected, rel=0.05)
