"""The position of each parameter in the flat vectors used for trajectories, gradients and adjoints."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from itertools import accumulate, compress, pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class ParameterLayout:
    """Names and shapes of the trained parameters, in the order of the optimizer's parameter groups.

    Each group is one contiguous slice, so an update with a group's hyperparameters is one operation on a view.

    Args:
        names: Parameter names as in ``module.named_parameters()``.
        shapes: Shapes of the parameters.
        group_lengths: Number of parameters (tensors) in each group.

    Example:
        >>> layout = ParameterLayout(("weight", "bias"), ((2, 3), (2,)), (1, 1))
        >>> layout.size, layout.group_slices
        (8, (slice(0, 6, None), slice(6, 8, None)))
        >>> layout.unflatten(torch.arange(8.0))["bias"]
        tensor([6., 7.])
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    group_lengths: tuple[int, ...]

    @property
    def sizes(self) -> list[int]:
        """Number of entries of each parameter."""
        return [math.prod(shape) for shape in self.shapes]

    @property
    def size(self) -> int:
        """P, the length of the flat vector."""
        return sum(self.sizes)

    @property
    def group_slices(self) -> tuple[slice, ...]:
        """Slice of each parameter group in the flat vector."""
        groups = torch.tensor(self.sizes).split(list(self.group_lengths))
        ends = accumulate((int(group.sum()) for group in groups), initial=0)
        return tuple(slice(start, stop) for start, stop in pairwise(ends))

    def group_parameters(self, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], ...]:
        """Return the parameters of each group without their values (on the meta device)."""
        each = iter(torch.empty(shape, dtype=dtype, device="meta") for shape in self.shapes)
        return tuple(tuple(next(each) for _ in range(length)) for length in self.group_lengths)

    def without(self, names: Collection[str]) -> ParameterLayout:
        """Return the layout without the named parameters."""
        kept = [name not in names for name in self.names]
        lengths = tuple(int(group.sum()) for group in torch.tensor(kept).split(list(self.group_lengths)))
        return ParameterLayout(tuple(compress(self.names, kept)), tuple(compress(self.shapes, kept)), lengths)

    def flatten(self, tensors: Iterable[Tensor], out: Tensor | None = None) -> Tensor:
        """Concatenate tensors, in the order of the layout, into one vector ``(P,)``."""
        flat = [tensor.detach().reshape(-1) for tensor in tensors]
        return torch.cat(flat) if out is None else torch.cat(flat, out=out)

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """Split the last dimension of ``(..., P)`` into the named parameters ``(..., *shape)``, as views."""
        parts = torch.split(vector, self.sizes, dim=-1)
        return {
            name: part.reshape((*part.shape[:-1], *shape))
            for name, shape, part in zip(self.names, self.shapes, parts, strict=True)
        }
