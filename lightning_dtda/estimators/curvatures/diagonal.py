"""The diagonal of the Gauss-Newton matrix."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from lightning_dtda.estimators.curvatures.curvature import Curvature, Damping, check_damping
from lightning_dtda.estimators.curvatures.identity import DiagonalSpectrum
from lightning_dtda.estimators.curvatures.layers import outer_products
from lightning_dtda.estimators.objective import Objective
from lightning_dtda.replay.network import Network


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
        network = objective.find_network(self.network)
        return DiagonalSpectrum(gauss_newton_diagonal(objective, network).add_(objective.penalty))

    @override
    def passes(self, objective: Objective) -> float:
        return 2.0


def gauss_newton_diagonal(objective: Objective, network: Network) -> Tensor:
    r"""Return the diagonal of the Gauss-Newton matrix without the weight decay ``(P,)``.

    .. math:: \frac1N \sum_{n, c} A_{nc}^2, \qquad \frac1N \sum_n a_n^2 \sum_c g_{nc}^2
        \text{ where } A_{nc} = g_{nc} a_n^\top
    """
    layers = outer_products(network, objective)
    plain = torch.ones(objective.size, dtype=torch.bool)
    for layer in layers:
        plain[layer.weight] = False
    columns = plain.nonzero()[:, 0].to(objective.theta.device)
    diagonal = torch.zeros_like(objective.theta)
    for _, rows, of_layers in objective.roots(network, columns, [layer.name for layer in layers]):
        diagonal[columns] += rows.square_().sum(0)
        for layer, (derivatives, inputs) in zip(layers, of_layers, strict=True):
            of_outputs = derivatives.square_().unflatten(0, (len(inputs), -1)).sum(1)
            diagonal[layer.weight] += (of_outputs.T @ inputs.square()).flatten()
    return diagonal.div_(objective.examples)
