"""``torch.optim.SGD`` in all its forms: momentum, dampening, Nesterov, weight decay, maximize."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_dtda.optimizers.update import Hyperparameters, State

MOMENTUM_BUFFER = "momentum_buffer"


def _add(x: Tensor, y: Tensor, scale: float | Tensor | bool) -> Tensor:
    """``x + scale * y``, by torch's fused kernel where the scale is a number: bitwise what the optimizer does."""
    if isinstance(scale, Tensor):
        return x + scale * y
    return torch.add(x, y, alpha=scale)


class SGD:
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
        >>> SGD().step(torch.ones(2), {}, torch.tensor([1.0, -1.0]), hyperparameters, first=True)[0]
        tensor([0.5000, 1.5000])
    """

    def initial_state(self, theta: Tensor, hyperparameters: Hyperparameters) -> State:
        """Return a zero momentum buffer where momentum is used, else no state at all."""
        return {MOMENTUM_BUFFER: torch.zeros_like(theta)} if _is_nonzero(hyperparameters["momentum"]) else {}

    def step(
        self, theta: Tensor, state: State, gradient: Tensor, hyperparameters: Hyperparameters, *, first: bool
    ) -> tuple[Tensor, State]:
        """Return the parameters ``(..., P)`` and the state after one step."""
        direction = -gradient if hyperparameters.get("maximize") else gradient
        weight_decay, momentum = hyperparameters["weight_decay"], hyperparameters["momentum"]
        if _is_nonzero(weight_decay):
            direction = _add(direction, theta, weight_decay)
        new_state: State = {}
        if MOMENTUM_BUFFER in state:
            if first:
                buffer = direction
            else:
                buffer = _add(state[MOMENTUM_BUFFER] * momentum, direction, 1 - hyperparameters["dampening"])
            new_state[MOMENTUM_BUFFER] = buffer
            direction = _add(direction, buffer, momentum) if hyperparameters.get("nesterov") else buffer
        return _add(theta, direction, -hyperparameters["lr"]), new_state

    def adjoint(
        self,
        theta: Tensor,
        state: State,
        gradient: Tensor,
        hyperparameters: Hyperparameters,
        theta_cotangent: Tensor,
        state_cotangent: State,
        *,
        first: bool,
    ) -> tuple[Tensor, State, Tensor]:
        """Return the cotangents of parameters, state and gradient before the step, each ``(..., P)``."""
        momentum, weight_decay = hyperparameters["momentum"], hyperparameters["weight_decay"]
        step_cotangent = -hyperparameters["lr"] * theta_cotangent
        new_state: State = {}
        if MOMENTUM_BUFFER in state_cotangent:
            buffer_cotangent = state_cotangent[MOMENTUM_BUFFER]
            if hyperparameters.get("nesterov"):
                buffer_cotangent = buffer_cotangent + momentum * step_cotangent
                direct = step_cotangent
            else:
                buffer_cotangent = buffer_cotangent + step_cotangent
                direct = torch.zeros_like(step_cotangent)
            intake = 1.0 if first else 1 - hyperparameters["dampening"]
            direction_cotangent = direct + intake * buffer_cotangent
            new_state[MOMENTUM_BUFFER] = buffer_cotangent * (0.0 if first else momentum)
        else:
            direction_cotangent = step_cotangent
        if _is_nonzero(weight_decay):
            theta_cotangent = theta_cotangent + weight_decay * direction_cotangent
        if hyperparameters.get("maximize"):
            direction_cotangent = -direction_cotangent
        return theta_cotangent, new_state, direction_cotangent


def _is_nonzero(value: float | Tensor | bool) -> bool:
    return bool((value != 0).any()) if isinstance(value, Tensor) else value != 0
