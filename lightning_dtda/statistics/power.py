"""How many runs or retrainings show an effect, and how large an effect some runs would have shown."""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import special
from torch import Tensor

from lightning_dtda.statistics.differences import DIFFERENCES, Difference

_MOST = 2**40
"""Number beyond which no number of runs or retrainings is enough."""

_T = (1e-6, 1e3)
"""Range of t in which SciPy inverts the noncentral distribution. Above, noncentralities are proportional to t."""

_DRAWS = 400
"""Number of simulated ensembles: the power is then known to 0.02."""

_STEP = 0.25
"""Distance of the simulated values of a logarithm: steps of an eighth in the standard error."""

_LEAST_INDEPENDENT = 1e-12
"""Share of the variance below which noise is none."""

_LARGEST_RISE = math.log(1000)
"""Rise of a log standard deviation beyond which a search gives up."""

_SPREAD = DIFFERENCES["spread"]

_DIFFERENCE_OF = {"mean": DIFFERENCES["mean"], "variance": _SPREAD}
"""Difference whose interval tells how large the change of a moment may be."""


class Needed(NamedTuple):
    """Numbers of runs or of retrainings that show effects, as ranges: the sizes of the effects are uncertain.

    Args:
        low: Number if the effect is as large as the data allow ``(...)``.
        estimate: Number if it is as large as estimated ``(...)``.
        high: Number if it is as small as the data allow ``(...)``; infinite if there may be none.
    """

    low: Tensor
    estimate: Tensor
    high: Tensor


def detectable(freedom: float, alpha: float, power: float) -> float:
    r"""Return the effect, in standard errors, that Student's t finds with the given power at a level of ``alpha``.

    It is the :math:`\delta` at which a noncentral t, with these degrees of freedom, exceeds :math:`t_{1-\alpha/2}` with
    this probability.

    Example:
        >>> round(detectable(19, alpha=0.05, power=0.8), 2)  # 2.80 with infinitely many runs
        2.95
    """
    return float(_noncentrality(-special.stdtrit(freedom, alpha / 2), freedom, 1 - power))


def detectable_spread(standard_error: float, runs: int, alpha: float, power: float) -> float:
    r"""Return the rise of the log standard deviation that the test of the spread finds with the given power.

    By simulation, since the test has no closed form: :math:`Y = k\, (\rho X + \sqrt{1 - \rho^2}\, \epsilon)` with
    Gaussian X and :math:`\epsilon` has a change of :math:`\log k`, whose standard error
    :math:`\sqrt{(1 - \rho^2) / (S - 1)}` gives the correlation :math:`\rho`. Simulated for a few values of
    :math:`1 - \rho^2`, and interpolated between them.

    Args:
        standard_error: Standard error of the change.
        runs: Number of runs, S.
        alpha: Level of the test.
        power: Probability of finding the change.

    Returns:
        The change, infinite if none is found.
    """
    independent = min(standard_error**2 * (runs - 1), 1.0)
    place = math.log(max(independent, _LEAST_INDEPENDENT)) / _STEP
    below = math.floor(place)
    low, high = (_detectable_spread(min(node, 0), runs, alpha, power) for node in (below, below + 1))
    if math.isinf(high):  # at the border of what can be found
        return high if place > below else low
    return low * (high / low) ** (place - below)


@cache
def _detectable_spread(node: int, runs: int, alpha: float, power: float) -> float:
    r"""Return :func:`detectable_spread` where :math:`1 - \rho^2` is ``exp(node * _STEP)``."""
    generator, independent = torch.Generator().manual_seed(0), math.exp(node * _STEP)
    x, noise = torch.randn(2, runs, _DRAWS, generator=generator, dtype=torch.float64)
    y = (1 - independent) ** 0.5 * x + independent**0.5 * noise
    missed, found = 0.0, _LARGEST_RISE

    def shows(rise: float) -> bool:
        return bool((_SPREAD.p_values(x, math.exp(rise) * y) <= alpha).double().mean() >= power)

    if not shows(found):
        return math.inf
    while found - missed > 0.01 * found:
        middle = (missed + found) / 2
        missed, found = (missed, middle) if shows(middle) else (middle, found)
    return found


def runs_to_detect(effect: Tensor, alpha: float, power: float) -> Tensor:
    r"""Return the number of runs with which Student's t finds an effect.

    Args:
        effect: Effect in standard deviations of what one run adds to the estimate: the standard error times
            :math:`\sqrt S` ``(...)``.
        alpha: Level of the test.
        power: Probability of finding the effect.

    Returns:
        Numbers ``(...)``, float64; infinite where there is no effect.

    Example:
        >>> runs_to_detect(torch.tensor([1.0, 0.5]), alpha=0.05, power=0.8)
        tensor([10., 34.], dtype=torch.float64)
    """
    return torch.as_tensor(_fewest(effect.abs().cpu().numpy(), alpha, power), device=effect.device)


def runs_for_significance(
    difference: Difference, p: Tensor, runs: int, alpha: float, power: float, level: float
) -> Tensor:
    r"""Return the total number of runs with which the test of an effect would give a p-value below ``alpha``.

    From S runs, the p-value tells t, and a noncentral t with :math:`S - 1` degrees of freedom tells which effects,
    :math:`\delta / \sqrt S` standard deviations, would have given a t as large: the ends of the interval are the
    :math:`\delta` at which :math:`P(T \le t)` is :math:`(1 \mp level) / 2`, and the estimate is that at which it is one
    half. It is exact for the mean of Gaussian responses. The number is the smallest at which such an effect is found
    with the given power, at least that with which the test can reach the level at all
    (:meth:`Difference.fewest_runs <lightning_dtda.statistics.Difference.fewest_runs>`).

    Args:
        difference: The difference.
        p: p-values of its test ``(...)``.
        runs: Number of runs that gave them, S.
        alpha: Level that the p-value must be below.
        power: Probability that it is.
        level: Confidence level of the range.

    Returns:
        Low end, estimate and high end ``(3, ...)``, float64; infinite where there is, or may be, no effect.

    Example:
        >>> from lightning_dtda.statistics import Mean
        >>> runs_for_significance(Mean(), torch.tensor(0.001), runs=20, alpha=0.01, power=0.8, level=0.9)
        tensor([11., 20., 68.], dtype=torch.float64)
    """
    tests = max(len(difference.moments), 1)  # the p-value is Bonferroni's, of that many
    freedom = difference.freedom(runs) or runs - 1
    t = -special.stdtrit(freedom, p.double().cpu().numpy() / (2 * tests))
    outside = (1 - level) / (2 * tests)
    found = [
        _fewest(_noncentrality(t, freedom, share) / runs**0.5, alpha / tests, power, freedom / (runs - 1))
        for share in (outside, 0.5, 1 - outside)
    ]
    return torch.as_tensor(np.stack(found), device=p.device).clamp_min(difference.fewest_runs(alpha))


def can_be_planned(difference: Difference, runs: int) -> bool:
    """Return whether :func:`retrainings_needed` knows a difference, and a number of runs is enough."""
    if difference.moments:
        return runs >= difference.least_runs_to_test
    # without pairs, the noise of X and of Y is that of leaving runs out, which needs a smooth property
    return difference.smooth and not difference.paired and not difference.no_interval(runs)


def retrainings_needed(
    difference: Difference, baseline: Tensor, predicted: Tensor, power: float, alpha: float, level: float
) -> Tensor:
    r"""Return the number of retrainings with, and equally without, the examples that would show the difference.

    Both samples come from fresh seeds, independent of each other, with n retrainings each. The difference
    :math:`\Delta` of a property of Y and X then has a standard error of :math:`\tau / \sqrt n`, where
    :math:`\tau^2 = \tau_X^2 + \tau_Y^2` is S times the jackknife's squared standard error of each, and Welch's t-test,
    with :math:`(n - 1)\, \tau^4 / (\tau_X^4 + \tau_Y^4)` degrees of freedom, finds it if
    :math:`\sqrt n\, |\Delta| / \tau` is large enough for a noncentral t. For the mean, :math:`\tau_X` and
    :math:`\tau_Y` are standard deviations.

    :math:`\Delta` and :math:`\tau` are both estimated from S runs, so :math:`\Delta / \tau` has an interval: its ends
    are as far from the estimate, on a logarithmic scale, as those of :math:`\Delta` and :math:`\tau` together (square
    root of the sum of squares; Zou and Donner, *Statistics in Medicine* 27, 2008). The change of a variance is planned
    as that of the spread, and a distance by mean and spread, each tested at half of ``alpha``: the smaller number.

    Args:
        difference: The difference; one that :func:`can_be_planned`.
        baseline: Samples of X, broadcastable against ``predicted`` ``(runs, ...)``.
        predicted: Samples of Y ``(runs, ...)``.
        power: Probability of finding the effect.
        alpha: Probability of finding an effect that does not exist.
        level: Confidence level of the range.

    Returns:
        Low end, estimate and high end ``(3, ...)``, float64; infinite where there is, or may be, no effect.

    Example:
        >>> from lightning_dtda.statistics import Mean
        >>> x = torch.tensor([-1.0, 0.0, 1.0, 0.5, -0.5], dtype=torch.float64)
        >>> y = x + torch.tensor([0.6, 0.8, 0.9, 0.7, 1.0], dtype=torch.float64)
        >>> retrainings_needed(Mean(), x, y, power=0.8, alpha=0.05, level=0.9)
        tensor([ 6., 18., 69.], dtype=torch.float64)
    """
    planned = [_DIFFERENCE_OF[moment] for moment in difference.moments] or [difference]
    baseline, predicted = torch.broadcast_tensors(baseline.double(), predicted.double())
    of_each = [
        _retrainings(each, baseline, predicted, power, alpha / len(planned), 1 - (1 - level) / len(planned))
        for each in planned
    ]
    return torch.stack(of_each).amin(0)


def _retrainings(
    difference: Difference, baseline: Tensor, predicted: Tensor, power: float, alpha: float, level: float
) -> Tensor:
    runs, effect = len(predicted), difference(baseline, predicted)
    ends = difference.interval(baseline, predicted, level)
    # of each run: what leaving it out tells about the errors of X's property and of Y's
    squares = (runs - 1) * runs * torch.stack(list(_left_out(difference, baseline, predicted))).square()
    of_both = squares.sum(0)
    of_one, of_all = squares.mean(1), of_both.mean(0)
    # of the logarithm of tau, as moments.log_spread_error: a single run may make most of the scatter
    others = of_all * (runs - 1) / (of_all * runs - of_both)
    error = ((others - others.mean(0)).square().sum(0).sqrt() / 2).nan_to_num(torch.inf, torch.inf)
    width = special.stdtrit(runs - 1, (1 + level) / 2) * error.where(of_all > 0, 0.0)
    sure = ends.sign().prod(0) > 0
    farthest, nearest = ends.abs().amax(0), ends.abs().amin(0).where(sure, 0)
    larger = (width.square() + (farthest / effect.abs()).log().square()).sqrt().exp()
    smaller = (-(width.square() + (nearest / effect.abs()).log().square()).sqrt()).exp()
    of_size = effect.abs() / of_all.sqrt()
    ratios = torch.stack([of_size * larger, of_size, of_size * smaller])
    # an estimate of zero may be an effect as large as the end of its interval; without scatter it is none
    of_none = torch.stack([(farthest / of_all.sqrt()).nan_to_num(0), *2 * [torch.zeros_like(of_size)]])
    effects = torch.where(effect == 0, of_none, ratios)
    shape = of_all.square() / of_one.square().sum(0)
    found = _fewest(effects.cpu().numpy(), alpha, power, shape.nan_to_num(1).cpu().numpy())
    return torch.as_tensor(found, device=predicted.device)


def _left_out(difference: Difference, baseline: Tensor, predicted: Tensor) -> tuple[Tensor, Tensor]:
    """Return how far the difference is from its mean without each run in X, and in Y ``(runs, ...)``."""
    runs = torch.arange(len(predicted), device=predicted.device)
    others = (runs + 1 + runs[:-1, None]) % len(runs)  # (runs - 1, runs): in each column, all but one
    of_x = difference(baseline[others], predicted[:, None])
    of_y = difference(baseline[:, None], predicted[others])
    return of_x - of_x.mean(0), of_y - of_y.mean(0)


def _fewest(effect: Any, alpha: float, power: float, shape: Any = 1.0) -> Any:
    """Return the smallest n at which Student's t finds an effect, infinite if there is none.

    Args:
        effect: Effect in standard deviations of the noise that each of the n adds ``(...)``.
        alpha: Level of the test.
        power: Probability of finding the effect.
        shape: Degrees of freedom for each n beyond the first ``(...)``.
    """
    inverse, wanted = _wanted(alpha, power)
    too_few, enough = np.ones(np.shape(effect)), np.full(np.shape(effect), float(_MOST))
    while (enough - too_few > 1).any():
        middle = np.floor((too_few + enough) / 2)
        found = np.sqrt(middle) * effect >= np.interp(-1 / (shape * (middle - 1).clip(0.5)), inverse, wanted)
        too_few, enough = np.where(found, too_few, middle), np.where(found, middle, enough)
    enough = np.where(enough < _MOST, enough, np.inf)
    return np.where(np.isnan(effect), np.nan, enough)


@cache
def _wanted(alpha: float, power: float) -> tuple[Any, Any]:
    """Tabulate the noncentrality that Student's t needs, against -1 / f: it is smooth in that of degrees of freedom."""
    freedom = np.concatenate([np.arange(1, 65), np.geomspace(65, 2.0 * _MOST, 100)])
    limits = -special.stdtrit(freedom, alpha / 2)
    return -1 / freedom, _noncentrality(limits, freedom, 1 - power)


def _noncentrality(t: Any, freedom: Any, share: float) -> Any:
    """Return the noncentrality at which Student's t is below t with a probability of ``share``; NaN for NaN."""
    known = np.clip(np.nan_to_num(t, posinf=_T[1]), *_T)
    return special.nctdtrinc(freedom, share, known) * np.maximum(t / known, 1)
