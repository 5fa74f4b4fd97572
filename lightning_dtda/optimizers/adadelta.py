"""``torch.optim.Adadelta``."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from lightning_dtda.optimizers.arithmetic import add_product, add_scaled
from lightning_dtda.optimizers.descent import Descent
from lightning_dtda.optimizers.update import Hyperparameters, State

OF_DIRECTIONS, OF_UPDATES = "square_avg", "acc_delta"


class Adadelta(Descent):
    r"""Adadelta (Zeiler, arXiv 1212.5701, algorithm 1) as torch computes it.

    With smoothing :math:`\rho` and :math:`h_t = \pm g_t + \gamma\theta_t`:

    .. math::
        v_{t+1} = \rho v_t + (1 - \rho) h_t^2, \qquad
        d_t = \frac{\sqrt{u_t + \epsilon}}{\sqrt{v_{t+1} + \epsilon}} h_t, \qquad
        u_{t+1} = \rho u_t + (1 - \rho) d_t^2, \qquad \theta_{t+1} = \theta_t - \eta d_t.
    """

    def initial_state(self, theta: Tensor, hyperparameters: Hyperparameters) -> State:
        """Return zero averages."""
        return {OF_DIRECTIONS: torch.zeros_like(theta), OF_UPDATES: torch.zeros_like(theta)}

    @override
    def descend(
        self, theta: Tensor, state: State, h: Tensor, hyperparameters: Hyperparameters, step: int
    ) -> tuple[Tensor, State]:
        rho, eps = hyperparameters["rho"], hyperparameters["eps"]
        of_directions = add_product(state[OF_DIRECTIONS] * rho, h, h, 1 - rho)
        update = (state[OF_UPDATES] + eps).sqrt() / (of_directions + eps).sqrt() * h
        of_updates = add_product(state[OF_UPDATES] * rho, update, update, 1 - rho)
        moved = add_scaled(theta, update, -hyperparameters["lr"])
        return moved, {OF_DIRECTIONS: of_directions, OF_UPDATES: of_updates}

    def preconditioner(self, state: State, hyperparameters: Hyperparameters, step: int) -> Tensor:
        """Return the ratio of the roots, with this step's update already included in the average of the updates."""
        eps = hyperparameters["eps"]
        return (state[OF_UPDATES] + eps).sqrt() / (state[OF_DIRECTIONS] + eps).sqrt()
