"""Random projections of gradients, for models whose gradients are too large to hold for all examples."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_dtda.errors import AttributionError
from lightning_dtda.units import is_quantity

_COLUMNS = 4096
"""Number of parameters whose part of the projection is drawn together."""


class Projection:
    r"""A random matrix S of P rows and k columns with :math:`E\, S S^\top = I`, which keeps inner products.

    Entries are :math:`\pm 1 / \sqrt k` (Achlioptas, *Database-friendly random projections*, 2003). The error
    of inner products, relative to the norms of the vectors, is about :math:`1 / \sqrt k` (Johnson and Lindenstrauss).
    The matrix is never stored: its parts are drawn again, with the same values, whenever they are needed.

    Args:
        size: Number of parameters P.
        dimension: Number of dimensions k.
        seed: Seed of the random matrix.

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
        if not (is_quantity(dimension, whole=True) and dimension >= 1):
            raise AttributionError(f"dimension={dimension!r}; give at least 1.")
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
            # drawn on the CPU, for the same values on every device
            generator.manual_seed(self._seed * 1_000_003 + number)
            signs = torch.randint(2, (columns.stop - columns.start, self.dimension), generator=generator)
            yield columns, (signs.to(like) * 2 - 1).mul_(self.dimension**-0.5)


def projection_to(dimension: int | None, size: int, seed: int = 0) -> Projection | None:
    """Return a projection to k dimensions; ``None`` if no projection is needed.

    Args:
        dimension: Number of dimensions k. Vectors are not projected if it is ``None``, or not below P, where a
            projection would only add noise.
        size: Number of parameters P.
        seed: Seed of the projection.
    """
    return None if dimension is None or dimension >= size else Projection(size, dimension, seed)


def check_dimension(dimension: int | None) -> int | None:
    """Return the number of dimensions of a projection if it is valid.

    Raises:
        AttributionError: If it is invalid.
    """
    if dimension is None or (isinstance(dimension, int) and not isinstance(dimension, bool) and dimension >= 1):
        return dimension
    raise AttributionError(f"projection={dimension!r}; give a positive number of dimensions, or None.")
