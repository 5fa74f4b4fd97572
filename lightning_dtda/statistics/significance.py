r"""Is an influence more than seed noise? Tests of no effect, over runs.

For each removal and query, the data are S independent pairs, one per seed: the measurement as trained, :math:`x_s`, and
as predicted without the examples, :math:`y_s = x_s + r_s`. A p-value is the probability, over seeds, of an effect at
least as clear as that in these runs if the removal does not change the distribution of the measurement. It takes the
linear response as given: it says nothing about how well :math:`r_s` predicts a retraining.

**The mean** changes by the average of the responses :math:`r_s`; Student's t tests whether it is zero. For responses
with a symmetric distribution, the test rejects too rarely rather than too often. For skewed ones it rejects too often:
with 8 runs and exponential responses, 16 times too often at p-values of 0.001.

**The variance** changes by the covariance of :math:`r_s` with :math:`v_s = (x_s + y_s) / 2`, up to a factor. If the
removal does nothing, x and y of a run can be exchanged, which flips the sign of :math:`r_s` and keeps :math:`v_s`. So

.. math:: T = \sum_s r_s (v_s - \bar v)

is compared with the sums over all :math:`2^S` choices of signs. The test is exact for any distribution, whether or not
responses are larger in outlying runs. The classical test, the Pitman-Morgan correlation of :math:`r_s` and :math:`v_s`,
has the right level for Gaussian pairs but, where responses are larger in outlying runs, rejects a hundred times too
often at p-values of 0.001. The share of choices beyond T is not counted but computed by a saddlepoint approximation
(Robinson, *Journal of the Royal Statistical Society B* 44, 1982), so it can be as small as :math:`2^{1-S}`, the
smallest possible. A shift far larger than its spread over runs hides a change of the variance.

**Distances** that are zero only if nothing changes, such as the Wasserstein and the energy distance, have an effect if
the mean or the variance has one: the p-value is twice the smaller of the two (Bonferroni). Their size alone is no
evidence: a small response of random sign hardly changes the distribution, yet moves each sample and so increases the
distance between the samples. A change of shape that leaves mean and variance the same is not found.

**Other differences** are tested by exchanging x and y in random runs and comparing the differences (Pesarin,
*Multivariate Permutation Tests*, 2001). This is exact for any difference, but no p-value is below one over the number
of exchanges.
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
"""Maximum number of exchange patterns tried: p-values of 0.05 are then known to a tenth."""

_NEWTON = 40
"""Maximum number of Newton steps; columns that have not converged by then are at the Chernoff bound."""

_FLAT = 1e-12
"""Smallest curvature of K that a step divides by; below it, the sum is the largest that any choice of signs gives."""

_CENTRE = 1e-3
"""Value of r below which, up to rounding, the correction is 0 / 0 and the p-value is 1."""

_TIES = 1e-9
"""Relative tolerance for equal differences of exchanged pairs, which are summed in different orders."""


def least_runs(difference: Difference) -> int:
    """Return the minimum number of runs for the test of a difference; for the variance, halfway points must vary."""
    return max(difference.least_runs, 4 if "variance" in difference.moments else 2)


def fewest_runs(difference: Difference, level: float) -> float:
    """Return the minimum number of runs with which the test can give a p-value as small as a level, or infinity.

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
    """Return the probability of an effect at least this clear if there is none.

    Args:
        difference: The difference to test.
        baseline: Samples of X, broadcastable against ``predicted`` ``(runs, ...)``.
        predicted: Samples of Y, from the same runs in the same order ``(runs, ...)``.

    Returns:
        p-values ``(...)``, float64; 1 where no run's measurement changes, NaN where the effect is NaN.

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
    """Combine the p-values of several tests ``(...)`` into one for an effect in any of them, by Bonferroni."""
    return (len(p) * torch.stack(list(p)).amin(0)).clamp_max(1)


def mean_test(baseline: Tensor, predicted: Tensor) -> Tensor:
    """Return two-sided p-values of E X = E Y, by Student's t of the responses.

    Args:
        baseline: Samples of X ``(runs, ...)``.
        predicted: Samples of Y ``(runs, ...)``.

    Returns:
        p-values ``(...)``, float64.
    """
    responses = (predicted - baseline).double()
    return student(responses.mean(0), responses.std(0) / len(responses) ** 0.5, len(responses))


def student(mean: Tensor, standard_error: Tensor, runs: int) -> Tensor:
    """Return two-sided p-values of a mean of zero, from the mean over runs and its standard error ``(...)``."""
    # 0 / 0 is no effect; anything else / 0 is an effect without noise
    t = torch.where(mean == 0, 0.0, mean / standard_error)
    return torch.as_tensor(2 * special.stdtr(runs - 1, -t.abs().cpu().numpy()), device=t.device)


def variance_test(baseline: Tensor, predicted: Tensor) -> Tensor:
    """Return two-sided p-values of Var X = Var Y, by exchanging X and Y.

    Args:
        baseline: Samples of X ``(runs, ...)``.
        predicted: Samples of Y ``(runs, ...)``.

    Returns:
        p-values ``(...)``, float64.
    """
    halfway = (baseline + predicted).double() / 2
    return sign_test((predicted - baseline) * (halfway - halfway.mean(0)))


def sign_test(terms: Tensor) -> Tensor:
    r"""Return the share of all choices of signs whose sum is at least as large, in absolute value, as the sum itself.

    With :math:`K(t) = \sum_s \log\cosh(t w_s)`, the logarithm of the moment generating function of the sum under random
    signs, and :math:`K'(t) = T` at its absolute value,

    .. math:: p = 2\, \Phi\left(-r - \tfrac1r \log \tfrac ur\right), \quad
        r = \sqrt{2 (tT - K(t))}, \quad u = t \sqrt{K''(t)}

    (Barndorff-Nielsen, *Biometrika* 73, 1986), at most the Chernoff bound :math:`2 e^{K(t) - tT}`, which is exact where
    all terms have the same sign, and at least :math:`2^{1-S}`.

    Args:
        terms: Terms :math:`w_s` of the sum ``(runs, ...)``.

    Returns:
        p-values ``(...)``, float64.

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
    r"""Return :math:`t \ge 0` where :math:`\sum_s w_s \tanh(t w_s)` is the total, for each column ``(columns,)``.

    Args:
        w: Terms, at most 1 in absolute value ``(runs, columns)``.
        total: Totals ``(columns,)``.
    """
    t = total / w.square().sum(0).clamp_min(torch.finfo(w.dtype).tiny)
    columns = torch.arange(len(total), device=w.device)
    for _ in range(_NEWTON):  # K' is concave for t > 0 and the start is left of the root, so t only grows
        slopes = (t[columns] * w).tanh_()
        missing = (total[columns] - (w * slopes).sum(0)).clamp_min(0)
        # most columns converge in a few steps; only those with nearly all terms of one sign, which need many, go on
        unfound = (missing > _TIES * total[columns]).nonzero()[:, 0]
        if not len(unfound):
            break
        columns, w, slopes = columns[unfound], w[:, unfound], slopes[:, unfound]
        t[columns] += missing[unfound] / (w.square() * (1 - slopes.square_())).sum(0).clamp_min(_FLAT)
    return t


def exchange_test(difference: Difference, baseline: Tensor, predicted: Tensor, exchanges: int = _EXCHANGES) -> Tensor:
    """Return p-values of the hypothesis that X and Y of a run can be exchanged, by exchanging them.

    Args:
        difference: The difference, signed or not.
        baseline: Samples of X ``(runs, ...)``.
        predicted: Samples of Y ``(runs, ...)``.
        exchanges: Number of exchange patterns to try. If no more exist, all are tried; otherwise random ones, the same
            in every call.

    Returns:
        p-values ``(...)``, float64.
    """
    runs = len(predicted)
    if 2**runs <= exchanges:
        patterns = torch.tensor(list(product([False, True], repeat=runs)))
    else:
        patterns = torch.rand(exchanges, runs, generator=torch.Generator().manual_seed(0)) < 0.5
        patterns[0] = False  # the unexchanged runs, so no p-value is zero (Phipson and Smyth, 2010)
    observed = difference(baseline, predicted).abs()
    reached = torch.zeros_like(observed, dtype=torch.float64)
    for pattern in patterns.to(predicted.device):
        exchanged = pattern.reshape(-1, *[1] * (predicted.ndim - 1))
        x, y = torch.where(exchanged, predicted, baseline), torch.where(exchanged, baseline, predicted)
        reached += difference(x, y).abs() >= observed * (1 - _TIES)
    # no difference reaches NaN, so the p-value would be zero
    return (reached / len(patterns)).where(~observed.isnan(), torch.nan)


def q_values(p: Tensor) -> Tensor:
    """Return the smallest false discovery rate at which each p-value along the last dimension is a discovery.

    By the Benjamini-Hochberg procedure (*Journal of the Royal Statistical Society B* 57, 1995).

    Args:
        p: p-values ``(..., tests)``; NaN counts as 1, so it is not a discovery at any rate below 1.

    Example:
        >>> q_values(torch.tensor([0.001, 0.04, 0.9], dtype=torch.float64))
        tensor([0.0030, 0.0600, 0.9000], dtype=torch.float64)
    """
    adjusted: Any = stats.false_discovery_control(np.nan_to_num(p.cpu().numpy(), nan=1.0), axis=-1)
    return torch.as_tensor(adjusted, device=p.device)


def discoveries(p: Tensor, fdr: float) -> Tensor:
    """Return which p-values along the last dimension are discoveries: those whose q-value is at most ``fdr``.

    On average, a share of ``fdr`` of the discoveries is false.

    Args:
        p: p-values ``(..., tests)``; NaN is never a discovery.
        fdr: False discovery rate.

    Example:
        >>> discoveries(torch.tensor([0.001, 0.04, 0.9]), fdr=0.05)
        tensor([ True, False, False])
    """
    return q_values(p) <= fdr
