"""``torch.optim.SGD`` in all its forms: momentum, dampening, Nesterov, weight decay, maximize."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_dtda.optimizers.arithmetic import add_scaled, is_nonzero
from lightning_dtda.optimizers.direction import direction, direction_adjoint, penalty
from lightning_dtda.optimizers.update import Hyperparameters, State, Update

MOMENTUM_BUFFER = "momentum_buffer"


class SGD(Update):
    r"""Stochastic gradient descent as ``torch.optim.SGD`` computes it, and its adjoint.

    With learning rate :math:`\eta`, momentum :math:`\mu`, dampening :math:`\tau` and weight decay :math:`\gamma`:

    .. math::
        h_t = \pm g_t + \gamma \theta_t, \qquad
        b_{t+1} = \mu b_t + (1 - \tau) h_t \;(\text{first step: } h_0), \qquad
        \theta_{t+1} = \theta_t - \eta u_t,

    where :math:`u_t` is :math:`h_t` without momentum, :math:`b_{t+1}` with it and
    :math:`h_t + \mu b_{t+1}` for Nesterov. The update is linear, so the adjoint needs no point of evaluation.

    Example:
        >>> import torch
        >>> hyperparameters = {"lr": 0.5, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0}
        >>> SGD().step(torch.ones(2), {}, torch.tensor([1.0, -1.0]), hyperparameters, step=0)[0]
        tensor([0.5000, 1.5000])
    """

    def initial_state(self, theta: Tensor, hyperparameters: Hyperparameters) -> State:
        """Return a zero momentum buffer where momentum is used, else no state at all."""
        return {MOMENTUM_BUFFER: torch.zeros_like(theta)} if is_nonzero(hyperparameters["momentum"]) else {}

    def step(
        self, theta: Tensor, state: State, gradient: Tensor, hyperparameters: Hyperparameters, *, step: int
    ) -> tuple[Tensor, State]:
        """Return the parameters ``(..., P)`` and the state after one step."""
        h, momentum = direction(theta, gradient, hyperparameters), hyperparameters["momentum"]
        if MOMENTUM_BUFFER not in state:
            return add_scaled(theta, h, -hyperparameters["lr"]), {}
        intake = 1 - hyperparameters["dampening"]
        buffer = h if step == 0 else add_scaled(state[MOMENTUM_BUFFER] * momentum, h, intake)
        update = add_scaled(h, buffer, momentum) if hyperparameters.get("nesterov") else buffer
        return add_scaled(theta, update, -hyperparameters["lr"]), {MOMENTUM_BUFFER: buffer}

    def penalty(self, hyperparameters: Hyperparameters) -> float:
        """Return the weight decay."""
        return penalty(hyperparameters)

    def rate(self, hyperparameters: Hyperparameters, step: int) -> float:
        r"""Return :math:`\eta (1 - \tau) / (1 - \mu)`, the sum of a geometric series; Nesterov's has the same."""
        rate, momentum = float(hyperparameters["lr"]), float(hyperparameters["momentum"])
        return rate * (1 - float(hyperparameters["dampening"])) / (1 - momentum) if momentum else rate

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
        update = -hyperparameters["lr"] * theta_cotangent
        before: State = {}
        if MOMENTUM_BUFFER in state_cotangent:
            momentum, buffer = hyperparameters["momentum"], state_cotangent[MOMENTUM_BUFFER]
            intake = 1.0 if step == 0 else 1 - hyperparameters["dampening"]
            if hyperparameters.get("nesterov"):
                buffer = add_scaled(buffer, update, momentum)
                direction_cotangent = add_scaled(update, buffer, intake)
            else:
                buffer = buffer + update
                direction_cotangent = intake * buffer
            before[MOMENTUM_BUFFER] = buffer * (0.0 if step == 0 else momentum)
        else:
            direction_cotangent = update
        theta_cotangent, gradient_cotangent = direction_adjoint(theta_cotangent, direction_cotangent, hyperparameters)
        return theta_cotangent, before, gradient_cotangent
