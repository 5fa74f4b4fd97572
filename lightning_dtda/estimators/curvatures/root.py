"""A root of the Gauss-Newton matrix: the Jacobian of the training outputs, weighted by the loss's curvature."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lightning_dtda.estimators.curvatures.layers import outer_products
from lightning_dtda.estimators.objective import Objective
from lightning_dtda.estimators.projection import Projection

_SHARE = 0.5
"""Fraction of the memory for the root or a part of it; the rest is for its computation."""

_STRIPS = 6
"""Number of row blocks of a Gram matrix; each is computed from the diagonal on, about half of the matrix in all."""

_LARGEST = 2**22
"""Number of elements of a temporary in products with outer products; about the size of a cache, larger is no faster."""


@dataclass(frozen=True)
class OuterProducts:
    r"""Columns of the root for a linear layer's weight, stored as factors: each row is :math:`g_{nc} a_n^\top`.

    Args:
        place: Place of the weight in the parameters.
        derivatives: Derivatives g by the layer's outputs ``(N * C, d_out)``.
        inputs: Inputs a ``(N, d_in)``.
    """

    place: slice
    derivatives: Tensor
    inputs: Tensor

    def gram(self, rows: slice, others: slice) -> Tensor:
        r"""Return some rows and columns of the Gram matrix, :math:`\langle g, g' \rangle \langle a, a' \rangle`.

        Args:
            rows: Examples of the rows.
            others: Examples of the columns.
        """
        outputs = len(self.derivatives) // len(self.inputs)
        of_inputs = self.inputs[rows] @ self.inputs[others].T
        first, second = (self.derivatives.unflatten(0, (-1, outputs))[part].flatten(0, 1) for part in (rows, others))
        result = first @ second.T
        result.view(len(of_inputs), outputs, -1, outputs).mul_(of_inputs[:, None, :, None])
        return result

    def times(self, vectors: Tensor) -> Tensor:
        """Return the product ``(N * C, Q)`` with vectors ``(Q, d_out * d_in)``."""
        examples, d_in = self.inputs.shape
        of_examples = self.derivatives.unflatten(0, (examples, -1)).mT
        products = [
            (self.inputs @ some.reshape(-1, d_in).T).unflatten(1, (len(some), -1)) @ of_examples
            for some in vectors.split(self._at_once)
        ]
        return torch.cat(products, 1).mT.flatten(0, 1)

    def transposed(self, weights: Tensor) -> Tensor:
        """Return the product ``(Q, d_out * d_in)`` of the transpose with ``weights`` ``(N * C, Q)``."""
        examples = len(self.inputs)
        of_examples = self.derivatives.unflatten(0, (examples, -1))
        products = [
            (some.unflatten(0, (examples, -1)).mT @ of_examples).flatten(1).T @ self.inputs
            for some in weights.split(self._at_once, 1)
        ]
        return torch.cat(products).reshape(weights.shape[1], -1)

    @property
    def _at_once(self) -> int:
        """Number of vectors that are multiplied at once; each takes a temporary of N d_out numbers."""
        return max(1, _LARGEST // (len(self.inputs) * self.derivatives.shape[1]))

    def squared_norm(self) -> float:
        """Return the sum of squares of all entries."""
        per_example = self.derivatives.square().sum(1).unflatten(0, (len(self.inputs), -1)).sum(1)
        return float(per_example @ self.inputs.square().sum(1))


class Root:
    r"""The root A of the Gauss-Newton matrix :math:`G = A^\top A / N + \operatorname{diag}(\gamma)`.

    The columns for a linear layer's weight are outer products. They are stored as two factors, from which products and
    Gram matrices are computed, with N (d_out + d_in) memory instead of N d_out d_in and the same saving of time in a
    Gram matrix. The other columns are kept in memory if they fit, or recomputed.

    Args:
        objective: The objective.
        projection: Optional projection S from P to k dimensions. The root is then A S, ``(N * C, k)``, without factors.
    """

    def __init__(self, objective: Objective, projection: Projection | None = None) -> None:
        self.objective = objective
        self.outputs = objective.outputs
        self.rows = objective.examples * objective.outputs
        self.size = objective.size if projection is None else projection.dimension
        self._projection = projection
        self._layers = outer_products(objective) if projection is None else []
        # numbers per example in the factors of all layers
        factors = sum(
            objective.outputs * layer.outputs + (layer.weight.stop - layer.weight.start) // layer.outputs
            for layer in self._layers
        )
        most = _SHARE * objective.memory / objective.theta.itemsize
        if factors * objective.examples > most / 2:
            self._layers, factors = [], 0
        plain = torch.ones(self.size, dtype=torch.bool)
        for layer in self._layers:
            plain[layer.weight] = False
        self._plain = plain.nonzero()[:, 0].to(objective.theta.device)
        """Columns that are not stored as factors."""
        self._width = max(1, int((most - factors * objective.examples) / self.rows))

    @property
    def is_kept(self) -> bool:
        """Whether the whole root is in memory."""
        return len(self._plain) <= self._width

    @cached_property
    def _kept(self) -> tuple[list[OuterProducts], Tensor]:
        """The columns stored as factors, and all others ``(N * C, n)`` if they fit."""
        columns = self._plain if self.is_kept else self._plain[:0]
        plain = self.objective.theta.new_empty(self.rows, len(columns))
        parts = []
        names = [layer.name for layer in self._layers]
        for place, rows, of_layers in self._rows(columns, names) if len(columns) or names else ():
            plain[place] = rows
            parts.append(of_layers)
        factors = [[torch.cat(factor) for factor in zip(*of_one, strict=True)] for of_one in zip(*parts, strict=True)]
        found = [OuterProducts(layer.weight, *pair) for layer, pair in zip(self._layers, factors, strict=True)]
        return found, plain

    def gram(self, chosen: Tensor) -> Tensor:
        """Return the Gram matrix ``(N * C, N * C)`` of some columns.

        Args:
            chosen: Mask of the columns (parameters or projected dimensions); either all or none of a parameter tensor.
        """
        layers, plain = self._kept
        result = plain.new_zeros(self.rows, self.rows)
        columns = chosen[self._plain].nonzero()[:, 0]
        if self.is_kept:
            blocks = iter([plain if len(columns) == plain.shape[1] else plain[:, columns]])
        else:
            blocks = self._blocks(self._plain[columns])
        layers = [layer for layer in layers if chosen[layer.place.start]]
        strips = torch.arange(self.objective.examples).split(-(-self.objective.examples // _STRIPS))
        for examples in strips:
            first, last = int(examples[0]), int(examples[-1]) + 1
            for layer in layers:
                self._add(result, self._place(examples), layer.gram(slice(first, last), slice(first, None)))
        for block in blocks:
            for rows in map(self._place, strips):
                self._add(result, rows, block[rows] @ block[rows.start :].T)
        return result

    def times(self, vectors: Tensor) -> Tensor:
        """Return A v ``(N * C, Q)`` for vectors ``(Q, P)``."""
        of_plain = vectors[:, self._plain] if self._layers else vectors
        result = torch.cat([part @ of_plain.T for _, part in self._parts()])
        for layer in self._kept[0]:
            result += layer.times(vectors[:, layer.place])
        return result

    def transposed(self, weights: Tensor) -> Tensor:
        """Return the products of the transpose with ``weights`` ``(N * C, Q)``, as ``(Q, P)``."""
        of_plain = weights.new_zeros(weights.shape[1], len(self._plain))
        for rows, part in self._parts():
            of_plain.addmm_(weights[rows].T, part)
        if not self._layers:
            return of_plain
        result = weights.new_empty(weights.shape[1], self.size)
        result[:, self._plain] = of_plain
        for layer in self._kept[0]:
            result[:, layer.place] = layer.transposed(weights)
        return result

    def trace(self) -> float:
        r"""Return the trace of :math:`A^\top A / N`."""
        of_plain = sum(float(part.square().sum()) for _, part in self._parts())
        return (of_plain + sum(layer.squared_norm() for layer in self._kept[0])) / self.objective.examples

    def _add(self, gram: Tensor, rows: slice, strip: Tensor) -> None:
        """Add rows of some examples, from the diagonal on, and the mirrored columns."""
        gram[rows, rows.start :] += strip
        gram[rows.stop :, rows] += strip[:, rows.stop - rows.start :].T

    def _place(self, indices: Tensor) -> slice:
        return slice(int(indices[0]) * self.outputs, (int(indices[-1]) + 1) * self.outputs)

    def _parts(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield places and rows of the plain columns: all at once if they are kept, else some examples at a time."""
        if self.is_kept:
            yield slice(None), self._kept[1]
            return
        for place, rows, _ in self._rows(self._plain):
            yield place, rows

    def _rows(
        self, columns: Tensor, layers: Sequence[str] = ()
    ) -> Iterator[tuple[slice, Tensor, list[tuple[Tensor, Tensor]]]]:
        """Yield, some examples at a time, the place and the rows of some columns, and the layers of ``RootRows``."""
        chosen = columns if self._projection is None and len(columns) < self.size else None
        among = None if chosen is None else self._plain
        for indices, rows, of_layers in self.objective.roots(chosen, layers, among):
            projected = rows if self._projection is None else self._projection.forward(rows)[:, columns]
            yield self._place(indices), projected, of_layers

    def _blocks(self, columns: Tensor) -> Iterator[Tensor]:
        """Yield plain columns ``(N * C, n)``, as many at a time as fit in the memory."""
        for chosen in columns.split(self._width):
            block = self.objective.theta.new_empty(self.rows, len(chosen))
            for place, rows, _ in self._rows(chosen):
                block[place] = rows
            yield block
