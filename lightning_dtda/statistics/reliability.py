"""Agreement between runs: a measure of how far an attribution can be trusted that needs no retraining."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from scipy import special
from torch import Tensor

from lightning_dtda.statistics.correlation import correlations

Influence = Callable[..., Tensor]
"""Function from positions of some runs, or seeds, to their influences ``(..., removals)``."""

SPLITS = 10
"""Number of random halvings averaged: their spread is then less than a third of that between sets of runs."""


def halves(number: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the positions in two random halves of a number of runs or seeds; one is left out if the number is odd."""
    order = torch.randperm(number, generator=generator)
    half = number // 2
    return order[:half], order[half : 2 * half]


def split_half(
    influence: Influence,
    numbers: Sequence[int],
    agreement: Callable[[Tensor, Tensor], Tensor] = correlations,
    splits: int = SPLITS,
) -> Tensor:
    """Return the agreement between the influences from two halves of the runs, averaged over random halvings.

    Args:
        influence: Function from one tensor of positions per entry of ``numbers`` to the influences ``(..., removals)``.
        numbers: Number of runs, at least 2; or number of seeds and of baseline seeds, each of which is halved.
        agreement: Agreement between two influences ``(..., removals)``; Spearman's correlation by default.
        splits: Number of halvings, which are the same in every call.

    Returns:
        Agreement ``(...)``, float64; NaN where no halving has one.
    """
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(splits):
        positions = [halves(number, generator) for number in numbers]
        first, second = (influence(*half) for half in zip(*positions, strict=True))
        found.append(agreement(first, second))
    return torch.stack(found).nanmean(0)


def spearman_brown(correlation: Tensor, longer: float) -> Tensor:
    r"""Return the correlation expected with more runs, from the correlation with few.

    With m times the runs, :math:`\rho(mS) = m\rho / (1 + (m - 1)\rho)` (Spearman, and Brown, *British Journal of
    Psychology* 3, 1910): the noise shrinks and the signal stays.

    Args:
        correlation: Correlation with few runs; negative values count as 0.
        longer: Factor m by which the number of runs grows.

    Example:
        >>> spearman_brown(torch.tensor(0.5), 2)
        tensor(0.6667)
    """
    known = correlation.clamp_min(0)
    return longer * known / (1 + (longer - 1) * known)


def reliability(influence: Influence, runs: int) -> Tensor:
    r"""Return how reliable a ranking of removals is, from how well halves of the runs agree about it.

    This is Spearman's correlation between the influences from two halves of the runs (:func:`split_half`), extrapolated
    to all runs (:func:`spearman_brown`). If the number S of runs is odd, halves have :math:`h = (S - 1) / 2` runs and
    the factor is :math:`S / h`. 1: other seeds would give the same ranking. 0: the ranking is seed noise. It says
    nothing about a bias that all runs share, for example that of the linear prediction.

    Args:
        influence: Function from the positions of some runs to their influences ``(queries, removals)``.
        runs: Number of runs, at least 4.

    Returns:
        Reliability ``(queries,)``, float64; 0 where all influences are equal.
    """
    # equal influences give no ranking
    return spearman_brown(split_half(influence, (runs,)).nan_to_num(0), runs / (runs // 2))


def top_agreement(influence: Influence, runs: int, k: int) -> Tensor:
    """Return the share of the k removals of largest absolute influence that two halves of the runs have in common.

    Args:
        influence: Function from the positions of some runs to their influences ``(queries, removals)``.
        runs: Number of runs, at least 2.
        k: Number of removals.

    Returns:
        Share ``(queries,)``, float64, averaged over random halvings.
    """

    def shared(first: Tensor, second: Tensor) -> Tensor:
        one, other = (each.abs().topk(k) for each in (first, second))
        same = one.indices[..., :, None] == other.indices[..., None, :]
        # removals without any influence are in no order
        return (same & (one.values > 0)[..., :, None] & (other.values > 0)[..., None, :]).sum((-1, -2)).double() / k

    return split_half(influence, (runs,), shared, 2 * SPLITS)  # more, as it uses k removals only


def runs_for_stable_top(share: Tensor, runs: int, k: int, removals: int, agreement: float) -> Tensor:
    r"""Return the number of runs with which the top k would be stable, from how stable they are with few.

    Influences from two ensembles are modelled as bivariate Gaussian over the removals, with a correlation :math:`\rho`
    that grows with the number of runs by the Spearman-Brown formula (:func:`spearman_brown`). The share of the top k
    that they have in common is a function of :math:`\rho` and :math:`k / N`, so the observed share gives
    :math:`\rho(S)`, and the desired share gives the factor m. Where influences have heavier tails than a Gaussian, the
    top stands out, and the answer, based on the observed share, is about the removals near the border of the top k.

    Args:
        share: Share of the top k that two ensembles have in common ``(queries,)``.
        runs: Number of runs in each of the two ensembles, S.
        k: Number of removals at the top.
        removals: Total number of removals, N.
        agreement: Desired share.

    Returns:
        Number of runs ``(queries,)``, float64; infinite where the overlap is no larger than by chance.

    Example:
        >>> shares = torch.tensor([0.5, 0.9], dtype=torch.float64)
        >>> runs_for_stable_top(shares, runs=10, k=10, removals=1000, agreement=0.9)
        tensor([306.,  10.], dtype=torch.float64)
    """
    correlations = 1 - np.logspace(0, -8, 801)  # fine near 1, where a stable top is
    shares = _shared_top(correlations, k / removals)
    rho, goal = (np.interp(values, shares, correlations) for values in (share.cpu().numpy(), agreement))
    with np.errstate(divide="ignore", invalid="ignore"):
        factor = np.where(goal == 0, 0.0, goal * (1 - rho) / (rho * (1 - goal)))
    needed = np.ceil((runs * factor).round(6)).clip(1)  # rounded: the desired share itself needs no further run
    return torch.as_tensor(needed, dtype=torch.float64, device=share.device)


def _shared_top(correlations: Any, top: float) -> Any:
    """Return the share of a Gaussian's largest absolute values that a correlated Gaussian has in common with it."""
    points = (np.arange(2000) + 0.5) / 2000
    border = special.ndtri(1 - top / 2)
    largest = special.ndtri(1 - top / 2 * points)[:, None]
    spread = np.sqrt(1 - correlations**2)
    with np.errstate(divide="ignore"):
        above, below = (border - correlations * largest) / spread, (-border - correlations * largest) / spread
    return (special.ndtr(-above) + special.ndtr(below)).mean(0)
