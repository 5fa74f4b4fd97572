"""The exact Hessian as a dense matrix."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from lightning_dtda.errors import AttributionError
from lightning_dtda.estimators.curvatures.curvature import Curvature, Damping, check_damping
from lightning_dtda.estimators.curvatures.spectrum import Function, Spectrum
from lightning_dtda.estimators.objective import Objective
from lightning_dtda.units import human_bytes, is_quantity

_ROWS = 64
"""Number of rows of the Hessian that are computed together."""

_MATRICES = 4
"""Number of matrices held at once: the Hessian, its eigenvectors, and the workspace of the decomposition."""


class ExactHessian(Curvature):
    r"""The Hessian of the training objective as a dense matrix with its eigendecomposition.

    With eigenvalues :math:`\lambda_i` and eigenvectors :math:`u_i`, and :math:`\lambda` the largest absolute one,

    .. math::
        (H + \delta)^{-1} = \sum_i \frac{u_i u_i^\top}{\lambda_i + \delta}, \qquad
        H^+ = \sum_{|\lambda_i| > \rho\lambda} \frac{u_i u_i^\top}{\lambda_i},

    the latter if the damping is zero (Koh and Liang, arXiv 1703.04730, section 2; Mlodozeniec et al., arXiv 2506.12965,
    theorem 2, for the pseudo-inverse). The Hessian of a network has negative eigenvalues even at the end of training;
    a damping that cancels one of them raises an error. It takes the memory of four P x P matrices, and time
    proportional to the third power of P.

    Args:
        damping: :math:`\delta`; ``"auto"`` for the mean eigenvalue, 0 for the pseudo-inverse.
        cutoff: :math:`\rho`; ``None`` for P times machine epsilon, as for matrix ranks.

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
                f"{human_bytes(objective.memory)} can be used. Raise memory_budget, or use GaussNewton(...), "
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
    """Return a cut-off if it is valid.

    Raises:
        AttributionError: If it is invalid.
    """
    if cutoff is not None and not (is_quantity(cutoff) and 0 <= cutoff < 1):
        raise AttributionError(f"cutoff={cutoff!r}; give a fraction of the largest eigenvalue, at least 0 and below 1.")
    return cutoff


def default_cutoff(values: Tensor) -> float:
    """Return the fraction of the largest eigenvalue below which eigenvalues are rounding, as for matrix ranks."""
    return len(values) * torch.finfo(values.dtype).eps


def hessian_matrix(objective: Objective) -> Tensor:
    """Return the Hessian of the objective ``(P, P)``."""
    matrix = objective.theta.new_empty(objective.size, objective.size)
    for part in torch.arange(objective.size, device=objective.theta.device).split(_ROWS):
        units = objective.theta.new_zeros(len(part), objective.size)
        matrix[part] = objective.hessian_products(units.scatter_(1, part[:, None], 1))
    return (matrix + matrix.T).div_(2)
