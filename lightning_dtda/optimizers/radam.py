"""``torch.optim.RAdam``: Adam that divides by its second moment only once that is estimated well enough."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from lightning_dtda.optimizers.adam import MEAN, SECOND_MOMENT, moments
from lightning_dtda.optimizers.arithmetic import Scale, add_scaled, root
from lightning_dtda.optimizers.descent import Descent
from lightning_dtda.optimizers.update import Hyperparameters, State

_KNOWN = 5.0
"""Length of the moving average above which torch divides by its root; the paper uses 4."""


class RAdam(Descent):
    r"""RAdam (Liu et al., arXiv 1908.03265, algorithm 2) as torch computes it.

    With Adam's moments :math:`m_{t+1}, v_{t+1}` of the directions :math:`h_t`,
    :math:`\rho_\infty = 2 / (1 - \beta_2) - 1` and
    :math:`\rho_t = \rho_\infty - 2 (t + 1) \beta_2^{t+1} / (1 - \beta_2^{t+1})`:

    .. math::
        \theta_{t+1} = (1 - \eta\gamma)\theta_t - \eta\, \frac{m_{t+1}}{1 - \beta_1^{t+1}} \cdot \begin{cases}
        r_t \sqrt{1 - \beta_2^{t+1}} \,/\, (\sqrt{v_{t+1}} + \epsilon) & \rho_t > 5 \\ 1 & \text{else,} \end{cases}
        \qquad r_t^2 = \frac{(\rho_t - 4)(\rho_t - 2)\rho_\infty}{(\rho_\infty - 4)(\rho_\infty - 2)\rho_t},

    with the factor :math:`1 - \eta\gamma` only if the decay is decoupled.
    """

    def initial_state(self, theta: Tensor, hyperparameters: Hyperparameters) -> State:
        """Return zero moments."""
        return {MEAN: torch.zeros_like(theta), SECOND_MOMENT: torch.zeros_like(theta)}

    @override
    def descend(
        self, theta: Tensor, state: State, h: Tensor, hyperparameters: Hyperparameters, step: int
    ) -> tuple[Tensor, State]:
        new_state = moments(state, h, hyperparameters)
        update = new_state[MEAN] / (1 - hyperparameters["betas.0"] ** (step + 1)) * hyperparameters["lr"]
        if _length(hyperparameters, step) > _KNOWN:
            update = update * _adaptive(new_state, hyperparameters, step) * _rectification(hyperparameters, step)
        return add_scaled(theta, update, -1.0), new_state

    def rate(self, hyperparameters: Hyperparameters, step: int) -> float:
        r"""Return :math:`\eta r_t`, or :math:`\eta` in the first steps: the weights of the mean gradient sum to one."""
        rate = float(hyperparameters["lr"])
        is_known = _length(hyperparameters, step) > _KNOWN
        return rate * float(_rectification(hyperparameters, step)) if is_known else rate

    def preconditioner(self, state: State, hyperparameters: Hyperparameters, step: int) -> Tensor:
        """Return the factor of the mean in the update besides the rate: ones in the first steps."""
        is_known = _length(hyperparameters, step) > _KNOWN
        return _adaptive(state, hyperparameters, step) if is_known else torch.ones_like(state[SECOND_MOMENT])


def _longest(hyperparameters: Hyperparameters) -> Scale:
    return 2 / (1 - hyperparameters["betas.1"]) - 1


def _length(hyperparameters: Hyperparameters, step: int) -> Scale:
    """Return the length of the equivalent moving average with equal weights."""
    faded = hyperparameters["betas.1"] ** (step + 1)
    return _longest(hyperparameters) - 2 * (step + 1) * faded / (1 - faded)


def _rectification(hyperparameters: Hyperparameters, step: int) -> Scale:
    longest, length = _longest(hyperparameters), _length(hyperparameters, step)
    return ((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)) ** 0.5


def _adaptive(state: State, hyperparameters: Hyperparameters, step: int) -> Tensor:
    correction = (1 - hyperparameters["betas.1"] ** (step + 1)) ** 0.5
    return correction / (root(state[SECOND_MOMENT]) + hyperparameters["eps"])
