"""Curvatures with known eigenvalues and eigenvectors, which allow any matrix function."""

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
"""Examples of curvatures with a spectrum, for messages."""

_ROUNDING = 16
"""Error bound of negative eigenvalues, in units in the last place of the largest one; at most 6 were observed."""

Function = Callable[[Tensor], Tensor]
"""Function applied to eigenvalues elementwise."""


class Spectrum(FittedCurvature):
    r"""A symmetric matrix :math:`H = \sum_i \lambda_i u_i u_i^\top` with known eigenvalues and eigenvectors.

    Its inverses, the projection onto its range, and matrix exponentials all have the form
    :math:`f(H) = \sum_i f(\lambda_i) u_i u_i^\top`. An eigenvalue counts as zero if its absolute value is at most
    :attr:`cutoff` times the largest one.
    """

    cutoff: float
    values: Tensor
    """The eigenvalues ``(P,)``; not needed if the class overrides the mean and the largest eigenvalue."""

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
            function: Function f. If it is not finite at an eigenvalue, neither are the results of vectors with a
                component along its eigenvector.
            vectors: Vectors v.
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
                f"The curvature with damping {damping:.3g} is singular: one eigenvalue is {singular[0]:.3g}. Give "
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
        objective: The objective to fit it to.
        without: Consequence of a missing spectrum, for the error.

    Raises:
        AttributionError: If it has no spectrum, or only one of projected gradients.
    """
    if getattr(curvature, "projection", None) is not None:
        raise AttributionError(
            f"{type(curvature).__name__}(projection={curvature.projection}) mixes parameters and has no spectrum over "  # type: ignore[attr-defined]
            "them. Leave projection out."
        )
    fitted = curvature.fit(objective)
    if not isinstance(fitted, Spectrum):
        solver = getattr(curvature, "solver", None)
        arguments = "" if solver is None else f"solver={solver!r}"
        raise AttributionError(
            f"{type(curvature).__name__}({arguments}) only computes products: it has no spectrum, {without}. "
            f"Use {_FITTING}."
        )
    return fitted


def pseudo_inverse(floor: float) -> Function:
    """Return 1 / x, and 0 where x counts as zero."""
    return lambda values: torch.where(values.abs() > floor, 1 / values, 0)
