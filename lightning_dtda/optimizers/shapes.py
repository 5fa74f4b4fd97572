"""Parameters in their own shapes, for updates that do not act on each entry by itself."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def split(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Split a flat vector ``(..., P)`` into tensors ``(..., *shape)``, shaped like those given."""
    parts = vector.split([each.numel() for each in like], -1)
    return [part.reshape((*part.shape[:-1], *each.shape)) for part, each in zip(parts, like, strict=True)]


def flatten(tensors: Iterable[Tensor], vector: Tensor) -> Tensor:
    """Concatenate tensors ``(..., *shape)`` to a flat vector, whose leading dimensions are those of another one."""
    return torch.cat([tensor.reshape(*vector.shape[:-1], -1) for tensor in tensors], -1)
