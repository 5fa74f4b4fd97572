"""Sums under random signs: which share of all choices of signs makes a sum as large as this one?"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_NEWTON = 40
"""Maximum number of Newton steps; columns that have not converged by then are at the Chernoff bound."""

_FLAT = 1e-12
"""Smallest curvature of K that a step divides by; below it, the sum is the largest that any choice of signs gives."""

_CENTRE = 1e-3
"""Value of r below which, up to rounding, the correction is 0 / 0 and the p-value is 1."""

_FOUND = 1e-9
"""Relative distance from the root at which Newton's steps end."""


def sign_test(terms: Tensor) -> Tensor:
    r"""Return the share of all choices of signs whose sum is at least as large, in absolute value, as the sum itself.

    Approximately, by a saddlepoint: on average 2 % too small with 10 terms, and 8 % with 5. With
    :math:`K(t) = \sum_s \log\cosh(t w_s)`, the logarithm of the moment generating function of the sum under random
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


def fewest_to_flip(level: float) -> int:
    """Return the minimum number of terms with which :func:`sign_test` can give a p-value as small as a level."""
    return 1 + math.ceil(-math.log2(level))


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
        unfound = (missing > _FOUND * total[columns]).nonzero()[:, 0]
        if not len(unfound):
            break
        columns, w, slopes = columns[unfound], w[:, unfound], slopes[:, unfound]
        t[columns] += missing[unfound] / (w.square() * (1 - slopes.square_())).sum(0).clamp_min(_FLAT)
    return t
