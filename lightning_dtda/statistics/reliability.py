"""Do the runs agree? A figure for how far an attribution can be trusted that needs no retraining."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy import special
from torch import Tensor

_SPLITS = 10
"""Random halvings that are averaged: their spread is then small next to what more runs would change."""


def halves(number: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the positions in two random halves of a number of runs, or of seeds; of an odd number one is left out."""
    order = torch.randperm(number, generator=generator)
    half = number // 2
    return order[:half], order[half : 2 * half]


def split_half(influence: Callable[[Tensor], Tensor], runs: int) -> Tensor:
    r"""Return the reliability of a ranking of removals from how well halves of the runs agree about it.

    Spearman's correlation :math:`\rho` between the influences from two halves of the runs, averaged over random
    halvings, and carried to all runs by Spearman and Brown's formula :math:`2\rho / (1 + \rho)` (Brown, *British
    Journal of Psychology* 3, 1910). 1: other seeds would give the same ranking. 0: the ranking is seed noise. It says
    nothing about a bias that all runs share, of the linear prediction for example.

    Args:
        influence: From the positions of some runs to their influences ``(queries, removals)``.
        runs: Number of runs, at least 4.

    Returns:
        ``(queries,)``, float64; negative agreement counts as 0.
    """
    generator = torch.Generator().manual_seed(0)
    agreements = []
    for _ in range(_SPLITS):
        first, second = (_standard_ranks(influence(half)) for half in halves(runs, generator))
        agreements.append((first * second).sum(-1))
    agreement = torch.stack(agreements).mean(0).clamp_min(0)
    return 2 * agreement / (1 + agreement)


def _standard_ranks(values: Tensor) -> Tensor:
    """Return ranks along the last dimension, ties by their mean rank, less their mean and divided by their norm.

    Zero where all are equal, which agrees with nothing; float64.
    """
    ascending, order = values.sort(-1)
    places = torch.arange(values.shape[-1], dtype=torch.float64, device=values.device).expand_as(ascending)
    if (ascending.diff(dim=-1) == 0).any():
        ascending = ascending.contiguous()
        last = torch.searchsorted(ascending, ascending, right=True) - 1
        places = (torch.searchsorted(ascending, ascending) + last).double() / 2
    ranks = torch.empty_like(places).scatter_(-1, order, places)
    ranks -= ranks.mean(-1, keepdim=True)
    return ranks / ranks.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)


def top_agreement(influence: Callable[[Tensor], Tensor], runs: int, k: int) -> Tensor:
    """Return which share of the k removals of largest absolute influence two halves of the runs have in common.

    Args:
        influence: From the positions of some runs to their influences ``(queries, removals)``.
        runs: Number of runs, at least 2.
        k: Number of removals.

    Returns:
        ``(queries,)``, float64: mean over random halvings.
    """
    generator = torch.Generator().manual_seed(0)
    shares = []
    for _ in range(2 * _SPLITS):  # of k alone: a rank correlation averages over all removals
        first, second = (influence(half).abs().topk(k).indices for half in halves(runs, generator))
        shares.append((first[..., :, None] == second[..., None, :]).sum((-1, -2)) / k)
    return torch.stack(shares).double().mean(0)


def runs_for_agreement(share: Tensor, runs: int, k: int, removals: int, agreement: float) -> Tensor:
    r"""Return with how many runs the top k would be stable, from how stable they are with few.

    Influences from two ensembles are taken as bivariate Gaussian over the removals, with a correlation :math:`\rho`
    that more runs raise by Spearman and Brown's formula, :math:`\rho(mS) = m\rho / (1 + (m - 1)\rho)`. The share of the
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
        >>> runs_for_agreement(shares, runs=10, k=10, removals=1000, agreement=0.9)
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
