"""Do the runs agree? A figure for how far an attribution can be trusted that needs no retraining."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torchmetrics.functional import spearman_corrcoef

_SPLITS = 10
"""Random halvings that are averaged: their spread is then small next to what more runs would change."""


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
        order = torch.randperm(runs, generator=generator)
        first, second = (influence(half) for half in (order[: runs // 2], order[runs // 2 : 2 * (runs // 2)]))
        agreements.append(torch.atleast_1d(spearman_corrcoef(first.T.squeeze(-1), second.T.squeeze(-1))))
    agreement = torch.stack(agreements).double().mean(0).clamp_min(0)
    return 2 * agreement / (1 + agreement)
