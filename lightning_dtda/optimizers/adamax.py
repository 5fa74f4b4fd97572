"""``torch.optim.Adamax``: Adam with the largest gradient instead of the second moment."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from lightning_dtda.optimizers.arithmetic import add_quotient
from lightning_dtda.optimizers.descent import Descent
from lightning_dtda.optimizers.update import Hyperparameters, State

MEAN, LARGEST = "exp_avg", "exp_inf"


class Adamax(Descent):
    r"""Adamax (Kingma and Ba, arXiv 1412.6980, algorithm 2) as torch computes it.

    With :math:`h_t = \pm g_t + \gamma\theta_t`:

    .. math::
        m_{t+1} = \beta_1 m_t + (1 - \beta_1) h_t, \qquad u_{t+1} = \max(\beta_2 u_t, |h_t| + \epsilon), \qquad
        \theta_{t+1} = \theta_t - \frac{\eta}{1 - \beta_1^{t+1}} \frac{m_{t+1}}{u_{t+1}}.
    """

    def initial_state(self, theta: Tensor, hyperparameters: Hyperparameters) -> State:
        """Return zeros."""
        return {MEAN: torch.zeros_like(theta), LARGEST: torch.zeros_like(theta)}

    @override
    def descend(
        self, theta: Tensor, state: State, h: Tensor, hyperparameters: Hyperparameters, step: int
    ) -> tuple[Tensor, State]:
        beta1, beta2 = hyperparameters["betas.0"], hyperparameters["betas.1"]
        mean = torch.lerp(state[MEAN], h, 1 - beta1)
        largest = torch.maximum(state[LARGEST] * beta2, h.abs() + hyperparameters["eps"])
        rate = hyperparameters["lr"] / (1 - beta1 ** (step + 1))
        return add_quotient(theta, mean, largest, -rate), {MEAN: mean, LARGEST: largest}

    def preconditioner(self, state: State, hyperparameters: Hyperparameters, step: int) -> Tensor:
        """Return the reciprocal of the update's denominator."""
        return 1 / state[LARGEST]
