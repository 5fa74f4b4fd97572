"""Random projections of gradients, for models with more parameters than can be held per example."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_dtda.errors import AttributionError

_COLUMNS = 4096
"""Parameters whose part of the projection is drawn together."""


class Projection:
    r"""A random matrix S of P rows and k columns with :math:`E\, S S^\top = I`, so that inner products survive.

    Entries are :math:`\pm 1 / \sqrt k` (Achlioptas, *Database-friendly random projections*, 2003). Relative to the
    norms, inner products of :math:`S^\top v` are those of v to about :math:`1 / \sqrt k` (Johnson and Lindenstrauss).
    The matrix is never held: its parts are drawn when they are needed, the same ones each time.

    Args:
        size: P.
        dimension: k.
        seed: Another seed is another matrix.

    Raises:
        AttributionError: If the dimension is not positive.

    Example:
        >>> projection, v = Projection(1000, 200), torch.ones(1, 1000)
        >>> projection.forward(v).shape
        torch.Size([1, 200])
        >>> bool((projection.forward(v).norm() / v.norm() - 1).abs() < 0.2)
        True
    """

    def __init__(self, size: int, dimension: int, seed: int = 0) -> None:
        if dimension < 1:
            raise AttributionError(f"A projection to {dimension} dimensions is none; give at least 1.")
        self.size = size
        self.dimension = dimension
        self._seed = seed

    def forward(self, vectors: Tensor) -> Tensor:
        r"""Return :math:`S^\top v` ``(..., k)`` for vectors ``(..., P)``."""
        result = vectors.new_zeros(*vectors.shape[:-1], self.dimension)
        for columns, part in self._parts(vectors):
            result += vectors[..., columns] @ part
        return result

    def transpose(self, vectors: Tensor) -> Tensor:
        """Return S u ``(..., P)`` for vectors ``(..., k)``."""
        result = vectors.new_empty(*vectors.shape[:-1], self.size)
        for columns, part in self._parts(vectors):
            result[..., columns] = vectors @ part.T
        return result

    def _parts(self, like: Tensor) -> Iterator[tuple[slice, Tensor]]:
        generator = torch.Generator()
        for number, start in enumerate(range(0, self.size, _COLUMNS)):
            columns = slice(start, min(start + _COLUMNS, self.size))
            # drawn on the CPU: the same on every device
            generator.manual_seed(self._seed * 1_000_003 + number)
            signs = torch.randint(2, (columns.stop - columns.start, self.dimension), generator=generator)
            yield columns, (signs.to(like) * 2 - 1).mul_(self.dimension**-0.5)


def projection_to(dimension: int | None, size: int, seed: int = 0) -> Projection | None:
    """Return a projection to so many dimensions; ``None`` if there is none to make.

    Args:
        dimension: k; ``None`` leaves vectors as they are, as does a k that is not below P, which would add noise only.
        size: P.
        seed: Of the projection.
    """
    return None if dimension is None or dimension >= size else Projection(size, dimension, seed)


def check_dimension(dimension: int | None) -> int | None:
    """Return a number of dimensions that can be one.

    Raises:
        AttributionError: If it cannot.
    """
    if dimension is None or (isinstance(dimension, int) and not isinstance(dimension, bool) and dimension >= 1):
        return dimension
    raise AttributionError(f"projection={dimension!r}; give a positive number of dimensions, or None.")
