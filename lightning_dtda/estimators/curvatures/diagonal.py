"""The diagonal of the Gauss-Newton matrix."""

from __future__ import annotations

from typing_extensions import override

from lightning_dtda.estimators.curvatures.curvature import Curvature, Damping, check_damping
from lightning_dtda.estimators.curvatures.identity import DiagonalSpectrum
from lightning_dtda.estimators.objective import Objective


class Diagonal(Curvature):
    r"""The diagonal of the Gauss-Newton matrix, all else taken for zero.

    .. math:: \operatorname{diag}(G) = \frac1N \sum_n \operatorname{diag}(A_n^\top A_n) + \gamma

    with the roots :math:`A_n` of :class:`~lightning_dtda.estimators.GaussNewton`. Cheap, and far from the matrix: the
    parameters of a network are anything but independent.

    Args:
        damping: :math:`\delta`; ``"auto"`` is the mean eigenvalue, 0 the pseudo-inverse.
        network: As for :class:`~lightning_dtda.estimators.GaussNewton`.

    Raises:
        AttributionError: If the damping is out of range.
    """

    arguments = ("damping", "network")

    def __init__(self, damping: Damping = "auto", network: str | None = None) -> None:
        self.damping = check_damping(damping)
        self.network = network

    @override
    def fit(self, objective: Objective) -> DiagonalSpectrum:
        diagonal = objective.theta.new_zeros(objective.size)
        for _, part in objective.roots(objective.find_network(self.network)):
            diagonal += part.square_().sum(0)
        return DiagonalSpectrum(diagonal.div_(objective.examples).add_(objective.penalty))

    @override
    def passes(self, objective: Objective) -> float:
        return 2.0
