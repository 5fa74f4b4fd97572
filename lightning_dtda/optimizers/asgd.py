"""``torch.optim.ASGD``: gradient descent with a decreasing learning rate."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from lightning_dtda.optimizers.arithmetic import Scale, add_scaled, same_for_all, scalar_dtype
from lightning_dtda.optimizers.descent import Descent
from lightning_dtda.optimizers.update import Hyperparameters, State

ETA = "eta"


class ASGD(Descent):
    r"""Averaged SGD (Polyak and Juditsky, *Acceleration of Stochastic Approximation by Averaging*, 1992) in torch.

    With the learning rate :math:`\eta` of the previous step (at the first step, its own):

    .. math::
        \eta_t = \frac{\eta}{(1 + \lambda \eta t)^\alpha}, \qquad
        \theta_{t+1} = (1 - \lambda\eta_t)\theta_t - \eta_t (\pm g_t + \gamma\theta_t).

    torch also keeps an average of the parameters, ``ax``. It has no effect on training and is not tracked here.
    """

    def initial_state(self, theta: Tensor, hyperparameters: Hyperparameters) -> State:
        """Return the learning rate of the first step."""
        rate = torch.zeros(*theta.shape[:-1], 1, dtype=scalar_dtype(), device=theta.device)
        return {ETA: rate.copy_(torch.as_tensor(hyperparameters["lr"]))}

    @override
    def descend(
        self, theta: Tensor, state: State, h: Tensor, hyperparameters: Hyperparameters, step: int
    ) -> tuple[Tensor, State]:
        rate = same_for_all(state[ETA].detach(), theta.dtype)
        decayed = theta * (1 - hyperparameters["lambd"] * rate)
        moved = add_scaled(decayed, h, -rate)
        later = torch.zeros_like(state[ETA]).copy_(torch.as_tensor(_rate(hyperparameters, step + 1)))
        return moved, {ETA: later}

    def rate(self, hyperparameters: Hyperparameters, step: int) -> float:
        r"""Return :math:`\eta_t`, assuming that the learning rate was the same at the previous step."""
        return float(_rate(hyperparameters, step))

    def decoupled_decay(self, hyperparameters: Hyperparameters, step: int) -> float:
        r"""Return :math:`\lambda\eta_t`."""
        return float(hyperparameters["lambd"]) * float(_rate(hyperparameters, step))


def _rate(hyperparameters: Hyperparameters, step: int) -> Scale:
    rate, decay = hyperparameters["lr"], hyperparameters["lambd"]
    return rate / (1 + decay * rate * step) ** hyperparameters["alpha"]
