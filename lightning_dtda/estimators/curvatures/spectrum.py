"""Curvatures that are known by their eigenvalues and eigenvectors: any function of them can be had."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor
from typing_extensions import override

from lightning_dtda.errors import AttributionError
from lightning_dtda.estimators.curvatures.curvature import Curvature, FittedCurvature, Solution
from lightning_dtda.estimators.objective import Objective

_FITTING = 'GaussNewton(solver="gram"), ExactHessian() or EKFAC()'
"""Curvatures with a spectrum, for messages."""

_ROUNDING = 16
"""Units in the last place of the largest eigenvalue that a negative one may be wrong by; at most 6 were seen."""

Function = Callable[[Tensor], Tensor]
"""From eigenvalues to the values of a function, entry by entry."""


class Spectrum(FittedCurvature):
    r"""A symmetric matrix :math:`H = \sum_i \lambda_i u_i u_i^\top` by its eigenvalues and eigenvectors.

    Its inverses, the projection onto its range and the matrix exponentials of a training of given length are all of one
    form, :math:`f(H) = \sum_i f(\lambda_i) u_i u_i^\top`. An eigenvalue counts as zero within a share
    :attr:`cutoff` of the largest absolute one.
    """

    cutoff: float
    values: Tensor
    """The eigenvalues ``(P,)``, unless the class has other means of knowing their mean and the largest one."""

    @property
    @override
    def mean_eigenvalue(self) -> float:
        return float(self.values.mean())

    @property
    def largest_eigenvalue(self) -> float:
        """The largest absolute eigenvalue."""
        return float(self.values.abs().max())

    @abstractmethod
    def apply(self, function: Function, vectors: Tensor) -> Tensor:
        """Return f(H) v for vectors ``(Q, P)``.

        Args:
            function: f; where it is not finite for an eigenvalue that a vector has a share in, so is the result.
            vectors: v.
        """

    @override
    def solve(self, vectors: Tensor, damping: float) -> Solution:
        if damping == 0:
            return Solution(self.apply(pseudo_inverse(self.cutoff * self.largest_eigenvalue), vectors))
        singular: list[float] = []
        rounding = _ROUNDING * torch.finfo(vectors.dtype).eps * self.largest_eigenvalue

        def inverse(values: Tensor) -> Tensor:
            damped = values + damping
            singular.extend(values[(values < 0) & (damped.abs() <= rounding)].tolist()[:1])
            return 1 / damped

        solution = self.apply(inverse, vectors)
        if singular:
            raise AttributionError(
                f"The curvature with damping {damping:.3g} is singular: it has the eigenvalue {singular[0]:.3g}. Give "
                "another damping, or 0 for the pseudo-inverse."
            )
        return Solution(solution)

    def project(self, vectors: Tensor) -> Tensor:
        """Return the projection of vectors ``(Q, P)`` onto the range of the matrix."""
        floor = self.cutoff * self.largest_eigenvalue
        return self.apply(lambda values: (values.abs() > floor).to(values), vectors)


def fit_spectrum(curvature: Curvature, objective: Objective, without: str) -> Spectrum:
    """Fit a curvature that has a spectrum of the parameters' own dimension.

    Args:
        curvature: The curvature.
        objective: What it is fitted to.
        without: What cannot be had without a spectrum, for the error.

    Raises:
        AttributionError: If it has none, or one of projected gradients.
    """
    if getattr(curvature, "projection", None) is not None:
        raise AttributionError(
            f"{type(curvature).__name__}(projection={curvature.projection}) mixes the range with what is outside of "  # type: ignore[attr-defined]
            "it. Leave projection out."
        )
    fitted = curvature.fit(objective)
    if not isinstance(fitted, Spectrum):
        solver = getattr(curvature, "solver", None)
        arguments = "" if solver is None else f"solver={solver!r}"
        raise AttributionError(
            f"{type(curvature).__name__}({arguments}) is known by its products only: it has no spectrum, {without}. "
            f"Use {_FITTING}."
        )
    return fitted


def pseudo_inverse(floor: float) -> Function:
    """Return 1 / x, and 0 where x counts as zero."""
    return lambda values: torch.where(values.abs() > floor, 1 / values, 0)
