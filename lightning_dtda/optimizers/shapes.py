"""Conversion between flat vectors and parameter shapes, for updates that do not act elementwise."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def split(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Split a flat vector ``(..., P)`` into tensors ``(..., *shape)`` with the shapes of the given tensors."""
    parts = vector.split([each.numel() for each in like], -1)
    return [part.reshape((*part.shape[:-1], *each.shape)) for part, each in zip(parts, like, strict=True)]


def flatten(tensors: Iterable[Tensor], vector: Tensor) -> Tensor:
    """Concatenate tensors ``(..., *shape)`` into a flat vector with the leading dimensions of ``vector``."""
    return torch.cat([tensor.reshape(*vector.shape[:-1], -1) for tensor in tensors], -1)
