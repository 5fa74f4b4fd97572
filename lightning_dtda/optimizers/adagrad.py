"""``torch.optim.Adagrad``: learning rate decay, weight decay, initial accumulator."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from lightning_dtda.optimizers.arithmetic import Scale, add_product, add_quotient, slope_of_root
from lightning_dtda.optimizers.descent import DescentWithAdjoint
from lightning_dtda.optimizers.update import Hyperparameters, State

SUM = "sum"


class Adagrad(DescentWithAdjoint):
    r"""Adagrad (Duchi et al., JMLR 12, 2011, figure 1) as torch computes it, and its adjoint.

    With learning rate :math:`\eta`, its decay :math:`\delta`, weight decay :math:`\gamma` and
    :math:`h_t = \pm g_t + \gamma\theta_t`:

    .. math::
        v_{t+1} = v_t + h_t^2, \qquad
        \theta_{t+1} = \theta_t - \frac{\eta}{1 + t\delta} \frac{h_t}{\sqrt{v_{t+1}} + \epsilon}.
    """

    def initial_state(self, theta: Tensor, hyperparameters: Hyperparameters) -> State:
        """Return the initial accumulator."""
        return {SUM: torch.zeros_like(theta) + hyperparameters["initial_accumulator_value"]}

    @override
    def descend(
        self, theta: Tensor, state: State, h: Tensor, hyperparameters: Hyperparameters, step: int
    ) -> tuple[Tensor, State]:
        total = add_product(state[SUM], h, h, 1)
        denominator = total.sqrt() + hyperparameters["eps"]
        return add_quotient(theta, h, denominator, -_rate(hyperparameters, step)), {SUM: total}

    def rate(self, hyperparameters: Hyperparameters, step: int) -> float:
        r"""Return :math:`\eta / (1 + t \delta)`."""
        return float(_rate(hyperparameters, step))

    def preconditioner(self, state: State, hyperparameters: Hyperparameters, step: int) -> Tensor:
        """Return the reciprocal of the update's denominator."""
        return 1 / (state[SUM].sqrt() + hyperparameters["eps"])

    @override
    def pull_back(
        self, state: State, h: Tensor, hyperparameters: Hyperparameters, of_theta: Tensor, of_state: State, step: int
    ) -> tuple[Tensor, State]:
        root = add_product(state[SUM], h, h, 1).sqrt()
        of_direction = -_rate(hyperparameters, step) / (root + hyperparameters["eps"])
        of_total = -of_direction * h / (root + hyperparameters["eps"]) * slope_of_root(root)

        total = torch.addcmul(of_state[SUM], of_theta, of_total)
        return torch.addcmul(of_theta * of_direction, total, 2 * h), {SUM: total}


def _rate(hyperparameters: Hyperparameters, step: int) -> Scale:
    return hyperparameters["lr"] / (1 + step * hyperparameters["lr_decay"])
