"""The interface of curvatures: products of the damped inverse with vectors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from lightning_dtda.errors import AttributionError
from lightning_dtda.estimators.objective import Objective

Damping: TypeAlias = "float | Literal['auto']"


@dataclass(frozen=True)
class Solution:
    r"""Products of the damped inverse with some vectors.

    Args:
        vectors: :math:`(H + \delta)^{-1} v` for each vector v ``(Q, P)``.
        residuals: :math:`\lVert (H + \delta) x - v \rVert / \lVert v \rVert` of iterative solutions ``(Q,)``; ``None``
            if the inverse comes from a decomposition.
    """

    vectors: Tensor
    residuals: Tensor | None = None


class FittedCurvature(ABC):
    """A curvature matrix at the parameters of one run, prepared for any damping."""

    @property
    @abstractmethod
    def mean_eigenvalue(self) -> float:
        """The trace divided by P."""

    @abstractmethod
    def solve(self, vectors: Tensor, damping: float) -> Solution:
        """Multiply vectors ``(Q, P)`` by the damped inverse, or by the pseudo-inverse if the damping is zero.

        Raises:
            AttributionError: If the damped matrix is singular, or the solver does not reach its tolerance.
        """


class Curvature(ABC):
    """The Hessian of the training objective or an approximation of it.

    A new curvature is one class with :meth:`fit`; the command line finds it by its import path.
    """

    arguments: ClassVar[tuple[str, ...]] = ("damping",)
    """Names of the attributes that the responses depend on."""

    auto_damping: ClassVar[float] = 1.0
    """Damping "auto" relative to the mean eigenvalue. Most eigenvalues of a trained network are far below the mean, so
    this damping keeps the few directions that training determined."""

    damping: Damping

    def settings(self) -> dict[str, Any]:
        """Return the constructor's arguments in JSON types."""
        values = {name: getattr(self, name) for name in self.arguments}
        arguments = {name: one.settings() if isinstance(one, Curvature) else one for name, one in values.items()}
        return {"class": f"{type(self).__module__}.{type(self).__qualname__}", **arguments}

    @abstractmethod
    def fit(self, objective: Objective) -> FittedCurvature:
        """Compute the matrix, or what its products need, for a run.

        Raises:
            AttributionError: If the matrix does not exist for the run, or does not fit in the memory.
        """

    def passes(self, objective: Objective) -> float:
        """Estimate the number of passes over the training examples for a fit and a solution."""
        return 1.0


def check_damping(damping: Damping) -> Damping:
    """Return a damping if it is valid.

    Raises:
        AttributionError: If it is invalid.
    """
    is_number = isinstance(damping, (int, float)) and not isinstance(damping, bool)
    if damping == "auto" or (is_number and 0 <= float(damping) < torch.inf):
        return damping
    raise AttributionError(f'damping={damping!r}; give "auto" or a non-negative number.')


def resolve_damping(damping: Damping, curvature: Curvature, fitted: FittedCurvature) -> float:
    r"""Return :math:`\delta`; "auto" means :attr:`Curvature.auto_damping` times the mean eigenvalue.

    Raises:
        AttributionError: If it is "auto" and the mean eigenvalue is not positive.
    """
    if damping != "auto":
        return float(damping)
    mean_eigenvalue = fitted.mean_eigenvalue
    if not mean_eigenvalue > 0:
        raise AttributionError(
            f'damping="auto" is relative to the mean eigenvalue, which is {mean_eigenvalue:.2g} here. Give a number.'
        )
    return curvature.auto_damping * mean_eigenvalue
