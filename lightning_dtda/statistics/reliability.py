"""Do the runs agree? A figure for how far an attribution can be trusted that needs no retraining."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from scipy import special
from torch import Tensor

from lightning_dtda.statistics.correlation import correlations

Influence = Callable[..., Tensor]
"""From positions of some runs, or seeds, to the influences of these ``(..., removals)``."""

SPLITS = 10
"""Random halvings that are averaged: they then spread by less than a third of what other runs would change."""


def halves(number: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the positions in two random halves of a number of runs, or of seeds; of an odd number one is left out."""
    order = torch.randperm(number, generator=generator)
    half = number // 2
    return order[:half], order[half : 2 * half]


def split_half(
    influence: Influence,
    numbers: Sequence[int],
    agreement: Callable[[Tensor, Tensor], Tensor] = correlations,
    splits: int = SPLITS,
) -> Tensor:
    """Return how well the influences from two halves of the runs agree, on average over random halvings.

    Args:
        influence: From one tensor of positions for each of ``numbers`` to the influences ``(..., removals)``.
        numbers: How many runs there are, at least 2; or how many seeds and how many baseline seeds, each halved.
        agreement: Of two influences ``(..., removals)``: Spearman's correlation, if not given.
        splits: Number of halvings, always the same ones.

    Returns:
        ``(...)``, float64; NaN where no halving has an agreement.
    """
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(splits):
        positions = [halves(number, generator) for number in numbers]
        first, second = (influence(*half) for half in zip(*positions, strict=True))
        found.append(agreement(first, second))
    return torch.stack(found).nanmean(0)


def spearman_brown(correlation: Tensor, longer: float) -> Tensor:
    r"""Return the correlation that measurements by more runs would have, from that by few.

    With a factor m of runs, :math:`\rho(mS) = m\rho / (1 + (m - 1)\rho)` (Spearman, and Brown, *British Journal of
    Psychology* 3, 1910): noise shrinks, and what is measured stays.

    Args:
        correlation: With few; negative agreement counts as 0.
        longer: m.

    Example:
        >>> spearman_brown(torch.tensor(0.5), 2)
        tensor(0.6667)
    """
    known = correlation.clamp_min(0)
    return longer * known / (1 + (longer - 1) * known)


def reliability(influence: Influence, runs: int) -> Tensor:
    r"""Return how reliable a ranking of removals is, from how well halves of the runs agree about it.

    Spearman's correlation between the influences from two halves of the runs (:func:`split_half`), carried to all
    of them (:func:`spearman_brown`); with an odd number S of runs, halves have :math:`h = (S - 1) / 2` and the factor
    is :math:`S / h`. 1: other seeds would give the same ranking. 0: the ranking is seed noise. It says
    nothing about a bias that all runs share, of the linear prediction for example.

    Args:
        influence: From the positions of some runs to their influences ``(queries, removals)``.
        runs: Number of runs, at least 4.

    Returns:
        ``(queries,)``, float64; 0 where all influences are equal.
    """
    # influences that are all the same rank nothing
    return spearman_brown(split_half(influence, (runs,)).nan_to_num(0), runs / (runs // 2))


def top_agreement(influence: Influence, runs: int, k: int) -> Tensor:
    """Return which share of the k removals of largest absolute influence two halves of the runs have in common.

    Args:
        influence: From the positions of some runs to their influences ``(queries, removals)``.
        runs: Number of runs, at least 2.
        k: Number of removals.

    Returns:
        ``(queries,)``, float64: mean over random halvings.
    """

    def shared(first: Tensor, second: Tensor) -> Tensor:
        one, other = (each.abs().topk(k).indices for each in (first, second))
        return (one[..., :, None] == other[..., None, :]).sum((-1, -2)).double() / k

    return split_half(influence, (runs,), shared, 2 * SPLITS)  # of k alone: a correlation averages over all removals


def runs_for_stable_top(share: Tensor, runs: int, k: int, removals: int, agreement: float) -> Tensor:
    r"""Return with how many runs the top k would be stable, from how stable they are with few.

    Influences from two ensembles are taken as bivariate Gaussian over the removals, with a correlation :math:`\rho`
    that more runs raise by Spearman and Brown's formula (:func:`spearman_brown`). The share of the
    top k that they have in common is a function of :math:`\rho` and :math:`k / N`; so the observed share gives
    :math:`\rho(S)`, and the wanted one the factor m. Where influences have heavier tails than a Gaussian, the top
    stands out and the answer, by the observed share, is about those removals that decide it.

    Args:
        share: Of the top k that two ensembles have in common ``(queries,)``.
        runs: Number of runs of each of these, S.
        k: Number of removals at the top.
        removals: Number of all, N.
        agreement: The share that is wanted.

    Returns:
        Number of runs ``(queries,)``, float64; infinite where no more is in common than by chance.

    Example:
        >>> shares = torch.tensor([0.5, 0.9], dtype=torch.float64)
        >>> runs_for_stable_top(shares, runs=10, k=10, removals=1000, agreement=0.9)
        tensor([306.,  10.], dtype=torch.float64)
    """
    correlations = 1 - np.logspace(0, -8, 801)  # fine near 1, where a stable top is
    shares = _shared_top(correlations, k / removals)
    rho, goal = (np.interp(values, shares, correlations) for values in (share.cpu().numpy(), agreement))
    with np.errstate(divide="ignore"):
        factor = goal * (1 - rho) / (rho * (1 - goal))
    needed = np.ceil((runs * factor).round(6)).clip(1)  # rounded: a share that is the wanted one needs no run more
    return torch.as_tensor(needed, dtype=torch.float64, device=share.device)


def _shared_top(correlations: Any, top: float) -> Any:
    """Return which share of a Gaussian's largest absolute values are those of a correlated one, too."""
    points = (np.arange(2000) + 0.5) / 2000
    border = special.ndtri(1 - top / 2)
    largest = special.ndtri(1 - top / 2 * points)[:, None]
    spread = np.sqrt(1 - correlations**2)
    with np.errstate(divide="ignore"):
        above, below = (border - correlations * largest) / spread, (-border - correlations * largest) / spread
    return (special.ndtr(-above) + special.ndtr(below)).mean(0)
