"""Curvatures that are known by their eigenvalues and eigenvectors: any function of them can be had."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor
from typing_extensions import override

from lightning_dtda.errors import AttributionError
from lightning_dtda.estimators.curvatures.curvature import FittedCurvature, Solution

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

    @property
    @abstractmethod
    def largest_eigenvalue(self) -> float:
        """The largest absolute eigenvalue."""

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


def pseudo_inverse(floor: float) -> Function:
    """Return 1 / x, and 0 where x counts as zero."""
    return lambda values: torch.where(values.abs() > floor, 1 / values, 0)
