"""``torch.optim.Adagrad``: learning rate decay, weight decay, initial accumulator."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_dtda.optimizers.arithmetic import Scale, add_product, add_quotient, slope_of_root
from lightning_dtda.optimizers.direction import direction, direction_adjoint, penalty
from lightning_dtda.optimizers.update import Hyperparameters, State, Update

SUM = "sum"


class Adagrad(Update):
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

    def step(
        self, theta: Tensor, state: State, gradient: Tensor, hyperparameters: Hyperparameters, *, step: int
    ) -> tuple[Tensor, State]:
        """Return the parameters ``(..., P)`` and the state after one step."""
        h = direction(theta, gradient, hyperparameters)
        total = add_product(state[SUM], h, h, 1)
        denominator = total.sqrt() + hyperparameters["eps"]
        return add_quotient(theta, h, denominator, -_rate(hyperparameters, step)), {SUM: total}

    def penalty(self, hyperparameters: Hyperparameters) -> float:
        """Return the weight decay."""
        return penalty(hyperparameters)

    def rate(self, hyperparameters: Hyperparameters, step: int) -> float:
        r"""Return :math:`\eta / (1 + t \delta)`."""
        return float(_rate(hyperparameters, step))

    def preconditioner(self, state: State, hyperparameters: Hyperparameters, step: int) -> Tensor:
        """Return one over the denominator of the update."""
        return 1 / (state[SUM].sqrt() + hyperparameters["eps"])

    def adjoint(
        self,
        theta: Tensor,
        state: State,
        gradient: Tensor,
        hyperparameters: Hyperparameters,
        theta_cotangent: Tensor,
        state_cotangent: State,
        *,
        step: int,
    ) -> tuple[Tensor, State, Tensor]:
        """Return the cotangents of parameters, state and gradient before the step, each ``(..., P)``."""
        h = direction(theta, gradient, hyperparameters)
        root = add_product(state[SUM], h, h, 1).sqrt()
        of_direction = -_rate(hyperparameters, step) / (root + hyperparameters["eps"])
        of_total = -of_direction * h / (root + hyperparameters["eps"]) * slope_of_root(root)

        total = torch.addcmul(state_cotangent[SUM], theta_cotangent, of_total)
        direction_cotangent = torch.addcmul(theta_cotangent * of_direction, total, 2 * h)
        theta_cotangent, gradient_cotangent = direction_adjoint(theta_cotangent, direction_cotangent, hyperparameters)
        return theta_cotangent, {SUM: total}, gradient_cotangent


def _rate(hyperparameters: Hyperparameters, step: int) -> Scale:
    return hyperparameters["lr"] / (1 + step * hyperparameters["lr_decay"])
