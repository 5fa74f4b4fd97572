"""A root of the Gauss-Newton matrix: the Jacobian of the training outputs, weighted by the loss's curvature."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_dtda.estimators.objective import Objective
from lightning_dtda.estimators.projection import Projection
from lightning_dtda.replay.network import Network

_SHARE = 0.5
"""Share of the memory that the root, or a part of it, may take; the rest is for computing it."""


class Root:
    r"""A of :math:`G = A^\top A / N + \operatorname{diag}(\gamma)`, held in memory where it fits, else computed again.

    Args:
        objective: The objective.
        network: What has C outputs.
        projection: If there is one, of P to k dimensions, the root is A S, ``(N * C, k)``.
    """

    def __init__(self, objective: Objective, network: Network, projection: Projection | None = None) -> None:
        self.objective = objective
        self.rows = objective.examples * network.outputs
        self.size = objective.size if projection is None else projection.dimension
        self._network = network
        self._projection = projection
        itemsize = objective.theta.itemsize
        self._width = max(1, int(_SHARE * objective.memory / (self.rows * itemsize)))
        self._kept: Tensor | None = None
        if self.size <= self._width:
            self._kept = objective.theta.new_empty(self.rows, self.size)
            for rows, part in self._parts():
                self._kept[rows] = part

    @property
    def is_kept(self) -> bool:
        """Whether the root is in memory."""
        return self._kept is not None

    def columns(self, chosen: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield some of the columns ``(N * C, n)``, as many at once as the memory holds, and which ones they are."""
        if self._kept is not None:
            yield chosen, self._kept if len(chosen) == self.size else self._kept[:, chosen]
            return
        for part in chosen.split(self._width):
            block = self.objective.theta.new_empty(self.rows, len(part))
            for rows, of_examples in self._parts():
                block[rows] = of_examples[:, part]
            yield part, block

    def times(self, vectors: Tensor) -> Tensor:
        """Return A v ``(N * C, Q)`` for vectors ``(Q, P)``."""
        if self._kept is not None:
            return self._kept @ vectors.T
        return torch.cat([part @ vectors.T for _, part in self._parts()])

    def transposed(self, weights: Tensor) -> Tensor:
        """Return the products of the transpose with ``weights`` ``(N * C, Q)``, as ``(Q, P)``."""
        if self._kept is not None:
            return weights.T @ self._kept
        result = weights.new_zeros(weights.shape[1], self.size)
        for rows, part in self._parts():
            result.addmm_(weights[rows].T, part)
        return result

    def trace(self) -> float:
        r"""Return the trace of :math:`A^\top A / N`."""
        parts = [self._kept] if self._kept is not None else (part for _, part in self._parts())
        return sum(float(part.square().sum()) for part in parts) / self.objective.examples

    def _parts(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield the rows of some examples at a time, and where they stand."""
        for indices, part in self.objective.roots(self._network):
            first, last = int(indices[0]) * self._network.outputs, (int(indices[-1]) + 1) * self._network.outputs
            yield slice(first, last), part if self._projection is None else self._projection.forward(part)
