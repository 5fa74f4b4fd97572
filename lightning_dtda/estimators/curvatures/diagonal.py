"""The diagonal of the Gauss-Newton matrix."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from lightning_dtda.estimators.curvatures.curvature import Curvature, Damping, check_damping
from lightning_dtda.estimators.curvatures.identity import DiagonalSpectrum
from lightning_dtda.estimators.curvatures.layers import outer_products
from lightning_dtda.estimators.objective import Objective

_SAMPLES = 64
"""Number of random vectors to estimate a diagonal; the error of an entry is about an eighth of its row's norm."""


class Diagonal(Curvature):
    r"""The diagonal of the Gauss-Newton matrix; all other entries are set to zero.

    .. math:: \operatorname{diag}(G) = \frac1N \sum_n \operatorname{diag}(A_n^\top A_n) + \gamma

    with the roots :math:`A_n` of :class:`~lightning_dtda.estimators.GaussNewton`. It is cheap but
    a poor approximation, because the parameters of a network are far from independent.

    Args:
        damping: :math:`\delta`; ``"auto"`` for the mean eigenvalue, 0 for the pseudo-inverse.

    Raises:
        AttributionError: If the damping is out of range.
    """

    def __init__(self, damping: Damping = "auto") -> None:
        self.damping = check_damping(damping)

    @override
    def fit(self, objective: Objective) -> DiagonalSpectrum:
        return DiagonalSpectrum(gauss_newton_diagonal(objective).add_(objective.penalty))

    @override
    def passes(self, objective: Objective) -> float:
        return 2.0


def gauss_newton_diagonal(objective: Objective, chosen: Tensor | None = None) -> Tensor:
    r"""Return the diagonal of the Gauss-Newton matrix without weight decay ``(P,)``, or chosen entries of it.

    .. math:: \frac1N \sum_{n, c} A_{nc}^2, \qquad \frac1N \sum_n a_n^2 \sum_c g_{nc}^2
        \text{ where } A_{nc} = g_{nc} a_n^\top

    If the matrix has no root in which each row belongs to one example (see ``Objective.has_root``), the diagonal is
    estimated from products with vectors of random signs, :math:`E[\epsilon \odot G \epsilon]` (Bekas, Kokiopoulou and
    Saad, 2007).
    """
    if not objective.has_root:
        generator = torch.Generator().manual_seed(0)
        total = torch.zeros_like(objective.theta)
        for _ in range(_SAMPLES):
            signs = torch.randint(2, (1, objective.size), generator=generator).to(total) * 2 - 1
            products = objective.gauss_newton_products(signs)
            total += (signs * products)[0] - objective.penalty
        total = total.div_(_SAMPLES).clamp_min_(0)
        return total if chosen is None else total[chosen]
    if chosen is not None:
        squares = [part.rows.square_().sum(0) for part in objective.roots(chosen)]
        return torch.stack(squares).sum(0).div_(objective.examples)
    layers = outer_products(objective)
    plain = torch.ones(objective.size, dtype=torch.bool)
    for layer in layers:
        plain[layer.weight] = False
    columns = plain.nonzero()[:, 0].to(objective.theta.device)
    diagonal = torch.zeros_like(objective.theta)
    for _, rows, of_layers in objective.roots(columns, [layer.name for layer in layers]):
        diagonal[columns] += rows.square_().sum(0)
        for layer, (derivatives, inputs) in zip(layers, of_layers, strict=True):
            of_outputs = derivatives.square_().unflatten(0, (len(inputs), -1)).sum(1)
            diagonal[layer.weight] += (of_outputs.T @ inputs.square()).flatten()
    return diagonal.div_(objective.examples)
