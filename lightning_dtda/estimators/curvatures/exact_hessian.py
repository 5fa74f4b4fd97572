"""The Hessian itself, as a matrix."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from lightning_dtda.errors import AttributionError
from lightning_dtda.estimators.curvatures.curvature import Curvature, Damping, check_damping
from lightning_dtda.estimators.curvatures.spectrum import Function, Spectrum
from lightning_dtda.estimators.objective import Objective
from lightning_dtda.units import human_bytes

_ROWS = 64
"""Rows of the Hessian that are computed together."""

_MATRICES = 4
"""Matrices that are held at once: the Hessian, its eigenvectors, and the work of finding them."""


class ExactHessian(Curvature):
    r"""The Hessian of the training objective, as a dense matrix that is decomposed into eigenvectors.

    With eigenvalues :math:`\lambda_i` and eigenvectors :math:`u_i`, and :math:`\lambda` the largest absolute one,

    .. math::
        (H + \delta)^{-1} = \sum_i \frac{u_i u_i^\top}{\lambda_i + \delta}, \qquad
        H^+ = \sum_{|\lambda_i| > \rho\lambda} \frac{u_i u_i^\top}{\lambda_i},

    the latter for a damping of zero (Koh and Liang, arXiv 1703.04730, section 2; Mlodozeniec et al., arXiv 2506.12965,
    theorem 2, for the pseudo-inverse). The Hessian of a network has negative eigenvalues, also at the end of a
    training; a damping that cancels one of them is refused. Memory is that of four P x P matrices, time grows with the
    third power of P.

    Args:
        damping: :math:`\delta`; ``"auto"`` is the mean eigenvalue, 0 the pseudo-inverse.
        cutoff: :math:`\rho`; ``None`` is P times the rounding of the precision, as for matrix ranks.

    Raises:
        AttributionError: If an argument is out of range.
    """

    arguments = ("damping", "cutoff")

    def __init__(self, damping: Damping = "auto", cutoff: float | None = None) -> None:
        self.damping = check_damping(damping)
        self.cutoff = check_cutoff(cutoff)

    @override
    def fit(self, objective: Objective) -> DenseSpectrum:
        needed = _MATRICES * objective.size**2 * objective.theta.itemsize
        if needed > objective.memory:
            raise AttributionError(
                f"The Hessian of {objective.size} parameters takes {human_bytes(needed)} to decompose; "
                f"{human_bytes(objective.memory)} may be used. Raise memory_budget, or use GaussNewton(...), "
                'Hessian(solver="cg") or EKFAC().'
            )
        return DenseSpectrum(hessian_matrix(objective), self.cutoff)

    @override
    def passes(self, objective: Objective) -> float:
        return 4.0 * objective.size / _ROWS


class DenseSpectrum(Spectrum):
    """The spectrum of a symmetric matrix ``(P, P)``."""

    def __init__(self, matrix: Tensor, cutoff: float | None) -> None:
        self.values, self._basis = torch.linalg.eigh(matrix)
        self.cutoff = default_cutoff(self.values) if cutoff is None else cutoff

    @override
    def apply(self, function: Function, vectors: Tensor) -> Tensor:
        return vectors @ self._basis * function(self.values) @ self._basis.T


def check_cutoff(cutoff: float | None) -> float | None:
    """Return a cut-off that can be one.

    Raises:
        AttributionError: If it cannot.
    """
    if cutoff is not None and not 0 <= cutoff < 1:
        raise AttributionError(f"cutoff={cutoff!r}; give a share of the largest eigenvalue, at least 0 and below 1.")
    return cutoff


def default_cutoff(values: Tensor) -> float:
    """Return the share of the largest eigenvalue below which one is rounding: as for the rank of a matrix."""
    return len(values) * torch.finfo(values.dtype).eps


def hessian_matrix(objective: Objective) -> Tensor:
    """Return the Hessian of the objective ``(P, P)``."""
    matrix = objective.theta.new_empty(objective.size, objective.size)
    for part in torch.arange(objective.size, device=objective.theta.device).split(_ROWS):
        units = objective.theta.new_zeros(len(part), objective.size)
        matrix[part] = objective.hessian_products(units.scatter_(1, part[:, None], 1))
    return (matrix + matrix.T).div_(2)
