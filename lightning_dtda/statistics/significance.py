"""Is an influence more than seed noise? Tests by exchange, and discoveries among many tests.

For each removal and query, the data are S independent pairs, one per seed: the measurement as trained, :math:`x_s`, and
as predicted without the examples, :math:`y_s = x_s + r_s`. A p-value is the probability, over seeds, of an effect at
least as clear as that in these runs if the removal does not change the property. It takes the linear response as given:
it says nothing about how well :math:`r_s` predicts a retraining. Each difference has its own test, see
:meth:`Difference.p_values <lightning_dtda.statistics.Difference.p_values>`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy import special, stats
from torch import Tensor

if TYPE_CHECKING:
    from lightning_dtda.statistics.differences.difference import Difference

_EXCHANGES = 2000
"""Maximum number of exchange patterns tried: p-values of 0.05 are then known to a tenth."""

_TIES = 1e-9
"""Relative tolerance for equal differences of exchanged pairs, which are summed in different orders."""


def exchange_test(difference: Difference, baseline: Tensor, predicted: Tensor, exchanges: int = _EXCHANGES) -> Tensor:
    """Return p-values of the hypothesis that X and Y of a run can be exchanged, by exchanging them.

    This is exact for any difference (Pesarin, *Multivariate Permutation Tests*, 2001), but the hypothesis is more than
    that the difference is zero, and no p-value is below one over the number of exchanges.

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


def fewest_to_exchange(level: float) -> float:
    """Return the minimum number of runs with which :func:`exchange_test` can give a p-value as small as a level."""
    # exchanging all runs gives a difference as large, so two of 2 ** S patterns reach it
    return 1 + math.ceil(-math.log2(level)) if level * _EXCHANGES >= 1 else math.inf


def of_any(p: Sequence[Tensor]) -> Tensor:
    """Combine the p-values of several tests ``(...)`` into one for an effect in any of them, by Bonferroni."""
    return (len(p) * torch.stack(list(p)).amin(0)).clamp_max(1)


def equivalence_p_values(estimate: Tensor, standard_error: Tensor, freedom: float, bound: float | Tensor) -> Tensor:
    r"""Return p-values of the hypothesis that an effect is at least as large as a bound, in absolute value.

    .. math:: p = P\left(T_\nu > \frac{b - |\hat\Delta|}{\widehat{se}}\right),

    the larger of two one-sided Student's t-tests (Schuirmann, *Journal of Pharmacokinetics and Biopharmaceutics* 15,
    1987). If it is small, the effect is smaller than the bound. That all of several effects are, each at a level
    :math:`\alpha`, is wrong with a probability of at most :math:`\alpha`, whatever their number: it is only wrong if it
    is for the largest (Berger, *Technometrics* 24, 1982).

    Args:
        estimate: Estimates ``(...)``.
        standard_error: Their standard errors ``(...)``.
        freedom: Degrees of freedom, :math:`\nu`.
        bound: Bound, a number or ``(...)``, in the unit of the estimates; for NaN, p-values are NaN.

    Returns:
        p-values ``(...)``, float64.

    Example:
        >>> errors = torch.tensor([0.1, 0.1])
        >>> equivalence_p_values(torch.tensor([0.0, -0.2]), errors, freedom=19, bound=0.3).round(decimals=3)
        tensor([0.0040, 0.1650], dtype=torch.float64)
    """
    room = bound - estimate.double().abs()
    certain = torch.where(room < 0, -torch.inf, torch.inf).where(~room.isnan(), torch.nan)
    t = torch.where(standard_error == 0, certain, room / standard_error)
    return torch.as_tensor(special.stdtr(freedom, -t.cpu().numpy()), device=t.device)


def without_effect(
    estimate: Tensor, standard_error: Tensor, freedom: float, bound: float | Tensor, significant: Tensor, fdr: float
) -> Tensor:
    """Return which effects along the last dimension are shown to be smaller than a bound, and are not significant.

    On average, a share of ``fdr`` of them is larger. See :func:`equivalence_p_values` for the other arguments.
    """
    return discoveries(equivalence_p_values(estimate, standard_error, freedom, bound), fdr) & ~significant


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
