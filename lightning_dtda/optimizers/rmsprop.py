"""``torch.optim.RMSprop``, with momentum, weight decay and the centered variant."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from lightning_dtda.optimizers.arithmetic import add_product, add_quotient, add_scaled, is_nonzero, slope_of_root
from lightning_dtda.optimizers.descent import DescentWithAdjoint
from lightning_dtda.optimizers.update import Hyperparameters, State

SECOND_MOMENT, MEAN, MOMENTUM_BUFFER = "square_avg", "grad_avg", "momentum_buffer"


class RMSprop(DescentWithAdjoint):
    r"""RMSprop (Tieleman and Hinton, *Lecture 6.5*, 2012) as torch computes it, and its adjoint.

    With learning rate :math:`\eta`, smoothing :math:`\alpha`, momentum :math:`\mu`, weight decay :math:`\gamma` and
    :math:`h_t = \pm g_t + \gamma\theta_t`:

    .. math::
        v_{t+1} = \alpha v_t + (1 - \alpha) h_t^2, \qquad a_{t+1} = \alpha a_t + (1 - \alpha) h_t, \qquad
        u_t = \frac{h_t}{\sqrt{v_{t+1} - a_{t+1}^2} + \epsilon}, \qquad
        b_{t+1} = \mu b_t + u_t, \qquad \theta_{t+1} = \theta_t - \eta b_{t+1}.

    The mean a is used only if ``centered`` is set (Graves, arXiv 1308.0850, equations 38 to 41). Without momentum, u
    replaces b.
    """

    def initial_state(self, theta: Tensor, hyperparameters: Hyperparameters) -> State:
        """Return zeros for the averages that are used."""
        names = [SECOND_MOMENT]
        names += [MEAN] if hyperparameters.get("centered") else []
        names += [MOMENTUM_BUFFER] if is_nonzero(hyperparameters["momentum"]) else []
        return {name: torch.zeros_like(theta) for name in names}

    @override
    def descend(
        self, theta: Tensor, state: State, h: Tensor, hyperparameters: Hyperparameters, step: int
    ) -> tuple[Tensor, State]:
        new_state = _averages(state, h, hyperparameters)
        root = _root(new_state)
        denominator = root + hyperparameters["eps"]
        rate = hyperparameters["lr"]
        if MOMENTUM_BUFFER not in state:
            return add_quotient(theta, h, denominator, -rate), new_state
        buffer = add_quotient(state[MOMENTUM_BUFFER] * hyperparameters["momentum"], h, denominator, 1)
        return add_scaled(theta, buffer, -rate), new_state | {MOMENTUM_BUFFER: buffer}

    def rate(self, hyperparameters: Hyperparameters, step: int) -> float:
        r"""Return :math:`\eta / (1 - \mu)`."""
        return float(hyperparameters["lr"]) / (1 - float(hyperparameters["momentum"]))

    def preconditioner(self, state: State, hyperparameters: Hyperparameters, step: int) -> Tensor:
        """Return the reciprocal of the update's denominator."""
        return 1 / (_root(state) + hyperparameters["eps"])

    @override
    def pull_back(
        self, state: State, h: Tensor, hyperparameters: Hyperparameters, of_theta: Tensor, of_state: State, step: int
    ) -> tuple[Tensor, State]:
        alpha = hyperparameters["alpha"]
        new_state = _averages(state, h, hyperparameters)
        root = _root(new_state)
        denominator = root + hyperparameters["eps"]
        # derivative with respect to the variance under the root, not yet to its two moments
        of_variance = -h / denominator.square() * slope_of_root(root)

        before: State = {}
        update = -hyperparameters["lr"] * of_theta
        if MOMENTUM_BUFFER in state:
            update = update + of_state[MOMENTUM_BUFFER]
            before[MOMENTUM_BUFFER] = update * hyperparameters["momentum"]
        second_moment = torch.addcmul(of_state[SECOND_MOMENT], update, of_variance)
        direction_cotangent = update / denominator
        direction_cotangent = direction_cotangent.addcmul_(second_moment, 2 * (1 - alpha) * h)
        if MEAN in state:
            mean = torch.addcmul(of_state[MEAN], update, -2 * new_state[MEAN] * of_variance)
            direction_cotangent = direction_cotangent + (1 - alpha) * mean
            before[MEAN] = mean * alpha
        before[SECOND_MOMENT] = second_moment * alpha
        return direction_cotangent, before


def _averages(state: State, h: Tensor, hyperparameters: Hyperparameters) -> State:
    """Return the new averages."""
    alpha = hyperparameters["alpha"]
    averages = {SECOND_MOMENT: add_product(state[SECOND_MOMENT] * alpha, h, h, 1 - alpha)}
    return averages | ({MEAN: torch.lerp(state[MEAN], h, 1 - alpha)} if MEAN in state else {})


def _root(averages: State) -> Tensor:
    """Return the square root of the variance, which the update divides by."""
    variance = averages[SECOND_MOMENT]
    if MEAN in averages:
        variance = add_product(variance, averages[MEAN], averages[MEAN], -1)
    return variance.sqrt()
