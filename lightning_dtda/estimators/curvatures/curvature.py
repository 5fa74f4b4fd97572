"""What every curvature is asked: its inverse times vectors."""

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
    r"""What a curvature made of some vectors.

    Args:
        vectors: :math:`(H + \delta)^{-1} v` for each vector v ``(Q, P)``.
        residuals: :math:`\lVert (H + \delta) x - v \rVert / \lVert v \rVert` of iterative solutions ``(Q,)``; ``None``
            where the inverse is that of a decomposition.
    """

    vectors: Tensor
    residuals: Tensor | None = None


class FittedCurvature(ABC):
    """A curvature matrix at the parameters of one run, whatever of it does not depend on the damping computed."""

    @property
    @abstractmethod
    def mean_eigenvalue(self) -> float:
        """The trace over P."""

    @abstractmethod
    def solve(self, vectors: Tensor, damping: float) -> Solution:
        """Apply the damped inverse, or for a damping of zero the pseudo-inverse, to vectors ``(Q, P)``.

        Raises:
            AttributionError: If the damped matrix cannot be inverted, or not to the tolerance that was asked for.
        """


class Curvature(ABC):
    """A matrix that stands for the Hessian of the training objective.

    A new curvature is one class with :meth:`fit`; the command line finds it by its import path.
    """

    arguments: ClassVar[tuple[str, ...]] = ("damping",)
    """Attributes that the answers depend on."""

    auto_damping: ClassVar[float] = 1.0
    """Damping "auto" over the mean eigenvalue. Most eigenvalues of a trained network are far below the mean: at that
    damping the few directions count that the training determined."""

    damping: Damping

    def settings(self) -> dict[str, Any]:
        """Return the constructor's arguments in JSON."""
        values = {name: getattr(self, name) for name in self.arguments}
        arguments = {name: one.settings() if isinstance(one, Curvature) else one for name, one in values.items()}
        return {"class": f"{type(self).__module__}.{type(self).__qualname__}", **arguments}

    @abstractmethod
    def fit(self, objective: Objective) -> FittedCurvature:
        """Compute what the matrix needs of a run.

        Raises:
            AttributionError: If the run has no such matrix, or it does not fit the memory.
        """

    def passes(self, objective: Objective) -> float:
        """Say how many times a fit and a solution pass over the training examples, roughly: for estimates of time."""
        return 1.0


def check_damping(damping: Damping) -> Damping:
    """Return a damping that can be one.

    Raises:
        AttributionError: If it cannot.
    """
    is_number = isinstance(damping, (int, float)) and not isinstance(damping, bool)
    if damping == "auto" or (is_number and 0 <= float(damping) < torch.inf):
        return damping
    raise AttributionError(f'damping={damping!r}; give "auto" or a number that is not negative.')


def resolve_damping(damping: Damping, curvature: Curvature, fitted: FittedCurvature) -> float:
    r"""Return :math:`\delta`; "auto" is :attr:`Curvature.auto_damping` times the mean eigenvalue.

    Raises:
        AttributionError: If it is "auto" and there is nothing to be relative to.
    """
    if damping != "auto":
        return float(damping)
    mean_eigenvalue = fitted.mean_eigenvalue
    if not mean_eigenvalue > 0:
        raise AttributionError(
            f'damping="auto" is relative to the mean eigenvalue, which is {mean_eigenvalue:.2g} here. Give a number.'
        )
    return curvature.auto_damping * mean_eigenvalue
