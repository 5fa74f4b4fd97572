"""The identity as curvature."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import override

from lightning_dtda.estimators.curvatures.curvature import Curvature, Damping, check_damping
from lightning_dtda.estimators.curvatures.spectrum import Function, Spectrum
from lightning_dtda.estimators.objective import Objective


class Identity(Curvature):
    r"""The identity matrix: responses are inner products of gradients.

    .. math:: r_k = \frac{1}{N (1 + \delta)} \nabla m(\theta_T)^\top \nabla l_k(\theta_T)

    A baseline for other curvatures. It has no unit, so the scale of the responses has no meaning.

    Args:
        damping: Damping :math:`\delta`.

    Raises:
        AttributionError: If the damping is out of range.
    """

    def __init__(self, damping: Damping = 0.0) -> None:
        self.damping = check_damping(damping)

    @override
    def fit(self, objective: Objective) -> DiagonalSpectrum:
        ones = objective.theta.new_ones(objective.size)
        return DiagonalSpectrum(ones if objective.scale is None else objective.scale.square())

    @override
    def passes(self, objective: Objective) -> float:
        return 0.0


class DiagonalSpectrum(Spectrum):
    """The spectrum of a diagonal matrix, given by its diagonal ``(P,)``."""

    def __init__(self, values: Tensor, cutoff: float = 0.0) -> None:
        self.values = values
        self.cutoff = cutoff

    @override
    def apply(self, function: Function, vectors: Tensor) -> Tensor:
        factors = function(self.values)
        # allocating many long vectors would take longer than everything else that the identity does
        return vectors if bool((factors == 1).all()) else vectors * factors
