"""Correlations over removals, for many queries at once."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

Correlation = Literal["spearman", "pearson"]


def ranks(values: Tensor) -> Tensor:
    """Rank along the last dimension, from 1; ties share their mean rank. In float64, where ranks and halves are exact.

    Example:
        >>> ranks(torch.tensor([0.5, 2.0, 0.5, -1.0]))
        tensor([2.5000, 4.0000, 2.5000, 1.0000], dtype=torch.float64)
    """
    order = _order(values)
    ascending = values.gather(-1, order)
    places = torch.arange(1, values.shape[-1] + 1, dtype=torch.float64, device=values.device).expand_as(ascending)
    if (ascending.diff(dim=-1) == 0).any():  # skipped without ties: the two searches take longer than the rest
        ascending = ascending.contiguous()
        not_above = torch.searchsorted(ascending, ascending, right=True)
        places = (torch.searchsorted(ascending, ascending) + not_above + 1).double() / 2
    return torch.empty_like(places).scatter_(-1, order, places)


def correlations(predicted: Tensor, real: Tensor, correlation: Correlation = "spearman") -> Tensor:
    r"""Compute the correlation along the last dimension.

    .. math:: \rho = \frac{\sum_k (a_k - \bar a)(b_k - \bar b)}{\lVert a - \bar a \rVert\, \lVert b - \bar b \rVert}

    where a and b are the influences, or their ranks for Spearman. The torchmetrics functions are not used because they
    rank in single precision, add a constant to the denominator, return 0 for constant truth, and take one column at a
    time.

    Args:
        predicted: Predicted influences ``(..., removals)``.
        real: Real influences ``(..., removals)``.
        correlation: ``"spearman"`` or ``"pearson"``.

    Returns:
        Correlations ``(...)``, float64. NaN where the real influence is the same for all removals, because there is
        nothing to predict; 0 where only the predicted influence is constant, because it predicts nothing.

    Example:
        >>> correlations(torch.tensor([[1.0, 2.0, 3.0], [1.0, 1.0, 1.0]]), torch.tensor([0.0, 5.0, 1.0]))
        tensor([0.5000, 0.0000], dtype=torch.float64)
    """
    unit = [_centred(ranks(values) if correlation == "spearman" else values.double()) for values in (predicted, real)]
    found = (unit[0] * unit[1]).sum(-1).clamp(-1, 1)
    found = found.masked_fill(is_constant(predicted), 0)
    return found.masked_fill(is_constant(real), torch.nan)


def is_constant(values: Tensor) -> Tensor:
    """Return whether all values along the last dimension are equal ``(...)``."""
    return values.amax(-1) == values.amin(-1)


def _order(values: Tensor) -> Tensor:
    """Return the positions that sort values along the last dimension, NaN last; NumPy is six times as fast as torch."""
    if values.device.type == "cpu" and values.dtype in (torch.float32, torch.float64):
        return torch.as_tensor(np.argsort(values.numpy(), -1))
    return values.argsort(-1)


def _centred(values: Tensor) -> Tensor:
    centred = values - values.mean(-1, keepdim=True)
    return centred / centred.norm(dim=-1, keepdim=True)
