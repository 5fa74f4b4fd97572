r"""Is an influence more than seed noise? Tests of no effect, over runs.

The data of a removal and a query are S independent pairs, one of each seed: the measurement as trained :math:`x_s` and
as predicted without the examples :math:`y_s = x_s + r_s`. A p-value is the probability, over the seeds, of an effect at
least as clear as that of these runs if the removal leaves the distribution of the measurement as it is. It takes the
linear response as given: it says nothing about how well :math:`r_s` predicts a retraining.

**The mean** changes by the average of the responses :math:`r_s`; that it is zero is tested by Student's t. Responses of
any symmetric distribution are rejected too rarely rather than too often; skewed ones are rejected too often, with 8
runs 16 times at p-values of 0.001 where they are exponential.

**The variance** changes by the covariance of :math:`r_s` with :math:`v_s = (x_s + y_s) / 2`, but for a factor. If the
removal does nothing, x and y of a run can be exchanged, which turns the sign of :math:`r_s` and leaves :math:`v_s`. So

.. math:: T = \sum_s r_s (v_s - \bar v)

is compared with the sums of all :math:`2^S` choices of signs: an exact test, whatever the distribution and whether or
not responses are larger in runs that are farther out. The classical one, Pitman's and Morgan's correlation of
:math:`r_s` and :math:`v_s`, rejects Gaussian pairs as it should, those a hundred times too often at p-values of 0.001.
The share of the choices beyond T is not counted but computed by a saddlepoint approximation (Robinson, *Journal of the
Royal Statistical Society B* 44, 1982), so that it can be as small as :math:`2^{1-S}`, the least there is. A shift far
larger than its spread over runs hides a change of the variance.

**Distances** that are zero only if nothing changes, such as the Wasserstein and the energy distance, have an effect if
the mean or the variance has: twice the smaller p-value (Bonferroni). Their own size is no test: a small response of
random sign leaves the distribution nearly as it is, and yet moves each sample and so the distance between the samples.
A change of shape that leaves mean and variance alone is not found.

**Others** are tested by exchange of x and y in random runs and comparing the differences (Pesarin, *Multivariate
Permutation Tests*, 2001). This is exact for any difference, but no p-value is below one over the number of exchanges.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import torch
from scipy import special, stats
from torch import Tensor

from lightning_dtda.statistics.differences import Difference

_EXCHANGES = 2000
"""Exchanges of pairs that are tried where there are more: p-values of 0.05 are then known to a tenth."""

_NEWTON = 40
"""Steps after which the saddlepoint is far enough out: what is left then lies at Chernoff's bound."""

_FLAT = 1e-12
"""Least curvature of K that a step divides by; flatter than this the sum is as large as any choice of signs makes
it."""

_CENTRE = 1e-3
"""Below this r the correction is 0 / 0, and the p-value one, both up to rounding."""

_TIES = 1e-9
"""Relative distance within which differences of exchanged pairs count as equal: they are sums in another order."""


def least_runs(difference: Difference) -> int:
    """Return how many runs the test of a difference needs: for the variance, those whose halfway points can vary."""
    return max(difference.least_runs, 4 if "variance" in difference.moments else 2)


def fewest_runs(difference: Difference, level: float) -> float:
    """Return with how many runs the test of a difference can have a p-value as small as a level; infinite if with none.

    Example:
        >>> from lightning_dtda.statistics import Variance
        >>> fewest_runs(Variance(), level=0.05 / 1000)  # 2 ** -15 is below it
        16
    """
    if "mean" in difference.moments:
        return least_runs(difference)
    if difference.moments:
        return max(least_runs(difference), 1 + math.ceil(-math.log2(level)))
    return max(least_runs(difference), math.ceil(-math.log2(level))) if level * _EXCHANGES >= 1 else math.inf


def p_values(difference: Difference, baseline: Tensor, predicted: Tensor) -> Tensor:
    """Return the probability of so clear an effect if there is none.

    Args:
        difference: What is tested.
        baseline: Samples of X, broadcastable against ``predicted`` ``(runs, ...)``.
        predicted: Samples of Y, from the same runs in the same order ``(runs, ...)``.

    Returns:
        ``(...)``, float64; 1 where no run's measurement changes, NaN where the effect is not a number.

    Example:
        >>> from lightning_dtda.statistics import Mean
        >>> p_values(Mean(), torch.zeros(5), torch.tensor([1.0, 2.0, 1.5, 1.0, 2.0])).round(decimals=4)
        tensor(0.0026, dtype=torch.float64)
    """
    if not difference.moments:
        return exchange_test(difference, baseline, predicted)
    tests = {"mean": mean_test, "variance": variance_test}
    return of_any([tests[moment](baseline, predicted) for moment in difference.moments])


def of_any(p: Sequence[Tensor]) -> Tensor:
    """Return p-values of no effect by any of some tests, from those of each ``(...)``, by Bonferroni."""
    return (len(p) * torch.stack(list(p)).amin(0)).clamp_max(1)


def mean_test(baseline: Tensor, predicted: Tensor) -> Tensor:
    """Return p-values of E X = E Y, of two sides, by Student's t of the responses.

    Args:
        baseline: Samples of X ``(runs, ...)``.
        predicted: Samples of Y ``(runs, ...)``.

    Returns:
        ``(...)``, float64.
    """
    responses = (predicted - baseline).double()
    return student(responses.mean(0), responses.std(0) / len(responses) ** 0.5, len(responses))


def student(mean: Tensor, standard_error: Tensor, runs: int) -> Tensor:
    """Return p-values of a mean of zero, of two sides, from the mean over runs and its standard error ``(...)``."""
    # 0 / 0 is no effect, anything else / 0 one without noise
    t = torch.where(mean == 0, 0.0, mean / standard_error)
    return torch.as_tensor(2 * special.stdtr(runs - 1, -t.abs().cpu().numpy()), device=t.device)


def variance_test(baseline: Tensor, predicted: Tensor) -> Tensor:
    """Return p-values of Var X = Var Y, of two sides, by exchange of X and Y.

    Args:
        baseline: Samples of X ``(runs, ...)``.
        predicted: Samples of Y ``(runs, ...)``.

    Returns:
        ``(...)``, float64.
    """
    halfway = (baseline + predicted).double() / 2
    return sign_test((predicted - baseline) * (halfway - halfway.mean(0)))


def sign_test(terms: Tensor) -> Tensor:
    r"""Return which share of all choices of signs makes a sum as large, in absolute value, as the sum is.

    With :math:`K(t) = \sum_s \log\cosh(t w_s)`, the logarithm of the moment generating function of the sum under random
    signs, and :math:`K'(t) = T` at its absolute value,

    .. math:: p = 2\, \Phi\left(-r - \tfrac1r \log \tfrac ur\right), \quad
        r = \sqrt{2 (tT - K(t))}, \quad u = t \sqrt{K''(t)}

    (Barndorff-Nielsen, *Biometrika* 73, 1986), never more than Chernoff's bound :math:`2 e^{K(t) - tT}`, which is exact
    where all terms have one sign, and never less than :math:`2^{1-S}`.

    Args:
        terms: :math:`w_s` ``(runs, ...)``.

    Returns:
        ``(...)``, float64.

    Example:
        >>> sign_test(torch.tensor([1.0, 2.0, 4.0, 8.0]))  # of 16 choices, two reach 15 or -15
        tensor(0.1250, dtype=torch.float64)
    """
    smallest = torch.finfo(torch.float64).tiny
    w = terms.double() / terms.abs().amax(0).clamp_min(smallest)
    total = w.sum(0).abs()
    t = _saddlepoint(w.reshape(len(w), -1), total.reshape(-1)).reshape(total.shape)
    large = (t * w).abs()
    generating = (large + torch.log1p((-2 * large).exp()) - math.log(2)).sum(0)
    r = (2 * (t * total - generating)).clamp_min(0).sqrt()
    u = t * (w / large.cosh()).square().sum(0).sqrt()
    skewed = torch.where(r > _CENTRE, r + (u / r).log() / r, r)
    bound, least = 2 * (-r.square() / 2).exp(), torch.exp2(1 - (w != 0).sum(0).double()).clamp_max(1)
    return (2 * torch.special.ndtr(-skewed)).minimum(bound).clamp_max(1).maximum(least)


def _saddlepoint(w: Tensor, total: Tensor) -> Tensor:
    r"""Return :math:`t \ge 0` with :math:`\sum_s w_s \tanh(t w_s)` a total, for each column ``(columns,)``.

    Args:
        w: ``(runs, columns)``, no larger than 1.
        total: ``(columns,)``.
    """
    t = total / w.square().sum(0).clamp_min(torch.finfo(w.dtype).tiny)
    columns = torch.arange(len(total), device=w.device)
    for _ in range(_NEWTON):  # K' is concave for t > 0 and the start is to the left of the root: it only grows
        slopes = (t[columns] * w).tanh_()
        missing = (total[columns] - (w * slopes).sum(0)).clamp_min(0)
        # most are found in a few steps, those with nearly all terms of one sign in many: these alone go on
        unfound = (missing > _TIES * total[columns]).nonzero()[:, 0]
        if not len(unfound):
            break
        columns, w, slopes = columns[unfound], w[:, unfound], slopes[:, unfound]
        t[columns] += missing[unfound] / (w.square() * (1 - slopes.square_())).sum(0).clamp_min(_FLAT)
    return t


def exchange_test(difference: Difference, baseline: Tensor, predicted: Tensor, exchanges: int = _EXCHANGES) -> Tensor:
    """Return p-values of the hypothesis that X and Y of a run can be exchanged, by exchanging them.

    Args:
        difference: The difference, of any sign.
        baseline: Samples of X ``(runs, ...)``.
        predicted: Samples of Y ``(runs, ...)``.
        exchanges: Number of exchanges tried; all of them where there are no more, else random ones, always the same.

    Returns:
        ``(...)``, float64.
    """
    runs = len(predicted)
    if 2**runs <= exchanges:
        patterns = torch.tensor(list(product([False, True], repeat=runs)))
    else:
        patterns = torch.rand(exchanges, runs, generator=torch.Generator().manual_seed(0)) < 0.5
        patterns[0] = False  # the runs as they are: no p-value is zero (Phipson and Smyth, 2010)
    observed = difference(baseline, predicted).abs()
    reached = torch.zeros_like(observed, dtype=torch.float64)
    for pattern in patterns.to(predicted.device):
        exchanged = pattern.reshape(-1, *[1] * (predicted.ndim - 1))
        x, y = torch.where(exchanged, predicted, baseline), torch.where(exchanged, baseline, predicted)
        reached += difference(x, y).abs() >= observed * (1 - _TIES)
    # nothing reaches what is not a number: a p-value of zero, were it not told
    return (reached / len(patterns)).where(~observed.isnan(), torch.nan)


def q_values(p: Tensor) -> Tensor:
    """Return the least false discovery rate at which each p-value along the last dimension is a discovery.

    By Benjamini's and Hochberg's procedure (*Journal of the Royal Statistical Society B* 57, 1995).

    Args:
        p: ``(..., tests)``; NaN, which is taken as 1, is no discovery at any rate below 1.

    Example:
        >>> q_values(torch.tensor([0.001, 0.04, 0.9], dtype=torch.float64))
        tensor([0.0030, 0.0600, 0.9000], dtype=torch.float64)
    """
    adjusted: Any = stats.false_discovery_control(np.nan_to_num(p.cpu().numpy(), nan=1.0), axis=-1)
    return torch.as_tensor(adjusted, device=p.device)


def discoveries(p: Tensor, fdr: float) -> Tensor:
    """Return which p-values along the last dimension are discoveries: those whose q-value is not above ``fdr``.

    Of the discoveries, a share of ``fdr`` is false on average.

    Args:
        p: ``(..., tests)``; NaN is none.
        fdr: The share.

    Example:
        >>> discoveries(torch.tensor([0.001, 0.04, 0.9]), fdr=0.05)
        tensor([ True, False, False])
    """
    return q_values(p) <= fdr
