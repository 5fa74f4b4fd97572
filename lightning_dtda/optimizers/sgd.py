"""``torch.optim.SGD`` in all its forms: momentum, dampening, Nesterov, weight decay, maximize."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from lightning_dtda.optimizers.arithmetic import add_scaled, is_nonzero
from lightning_dtda.optimizers.descent import DescentWithAdjoint
from lightning_dtda.optimizers.update import Hyperparameters, State

MOMENTUM_BUFFER = "momentum_buffer"


class SGD(DescentWithAdjoint):
    r"""Stochastic gradient descent as ``torch.optim.SGD`` computes it, and its adjoint.

    With learning rate :math:`\eta`, momentum :math:`\mu`, dampening :math:`\tau` and weight decay :math:`\gamma`:

    .. math::
        h_t = \pm g_t + \gamma \theta_t, \qquad
        b_{t+1} = \mu b_t + (1 - \tau) h_t \;(\text{first step: } h_0), \qquad
        \theta_{t+1} = \theta_t - \eta u_t,

    where :math:`u_t` is :math:`h_t` without momentum, :math:`b_{t+1}` with momentum and :math:`h_t + \mu b_{t+1}` with
    Nesterov momentum. The update is linear, so the adjoint does not depend on the point.

    Example:
        >>> import torch
        >>> hyperparameters = {"lr": 0.5, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0}
        >>> SGD().step(torch.ones(2), {}, torch.tensor([1.0, -1.0]), hyperparameters, step=0)[0]
        tensor([0.5000, 1.5000])
    """

    def initial_state(self, theta: Tensor, hyperparameters: Hyperparameters) -> State:
        """Return a zero momentum buffer if momentum is used, else an empty state."""
        return {MOMENTUM_BUFFER: torch.zeros_like(theta)} if is_nonzero(hyperparameters["momentum"]) else {}

    @override
    def descend(
        self, theta: Tensor, state: State, h: Tensor, hyperparameters: Hyperparameters, step: int
    ) -> tuple[Tensor, State]:
        if MOMENTUM_BUFFER not in state:
            return add_scaled(theta, h, -hyperparameters["lr"]), {}
        intake = 1 - hyperparameters["dampening"]
        momentum = hyperparameters["momentum"]
        buffer = h if step == 0 else add_scaled(state[MOMENTUM_BUFFER] * momentum, h, intake)
        update = add_scaled(h, buffer, momentum) if hyperparameters.get("nesterov") else buffer
        return add_scaled(theta, update, -hyperparameters["lr"]), {MOMENTUM_BUFFER: buffer}

    def rate(self, hyperparameters: Hyperparameters, step: int) -> float:
        r"""Return :math:`\eta (1 - \tau) / (1 - \mu)`, the sum of a geometric series, also with Nesterov momentum."""
        rate, momentum = float(hyperparameters["lr"]), float(hyperparameters["momentum"])
        return rate * (1 - float(hyperparameters["dampening"])) / (1 - momentum) if momentum else rate

    @override
    def pull_back(
        self, state: State, h: Tensor, hyperparameters: Hyperparameters, of_theta: Tensor, of_state: State, step: int
    ) -> tuple[Tensor, State]:
        update = -hyperparameters["lr"] * of_theta
        if MOMENTUM_BUFFER not in of_state:
            return update, {}
        momentum, buffer = hyperparameters["momentum"], of_state[MOMENTUM_BUFFER]
        intake = 1.0 if step == 0 else 1 - hyperparameters["dampening"]
        if hyperparameters.get("nesterov"):
            buffer = add_scaled(buffer, update, momentum)
            of_direction = add_scaled(update, buffer, intake)
        else:
            buffer = buffer + update
            of_direction = intake * buffer
        return of_direction, {MOMENTUM_BUFFER: buffer * (0.0 if step == 0 else momentum)}
