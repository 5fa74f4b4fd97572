"""``torch.optim.Adam`` and ``AdamW``, with and without amsgrad."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from lightning_dtda.optimizers.arithmetic import Scale, add_product, add_quotient, slope_of_root
from lightning_dtda.optimizers.descent import DescentWithAdjoint
from lightning_dtda.optimizers.update import Hyperparameters, State

MEAN, SECOND_MOMENT, LARGEST = "exp_avg", "exp_avg_sq", "max_exp_avg_sq"


class Adam(DescentWithAdjoint):
    r"""Adam (Kingma and Ba, arXiv 1412.6980, algorithm 1) as torch computes it, and its adjoint.

    With learning rate :math:`\eta`, weight decay :math:`\gamma` and :math:`h_t = \pm g_t + \gamma\theta_t`, or
    :math:`h_t = \pm g_t` if the decay is decoupled (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2):

    .. math::
        m_{t+1} = \beta_1 m_t + (1 - \beta_1) h_t, \qquad v_{t+1} = \beta_2 v_t + (1 - \beta_2) h_t^2, \qquad
        \theta_{t+1} = (1 - \eta\gamma)\theta_t - \frac{\eta}{1 - \beta_1^{t+1}}
        \frac{m_{t+1}}{\sqrt{v_{t+1} / (1 - \beta_2^{t+1})} + \epsilon},

    with the factor :math:`1 - \eta\gamma` only if the decay is decoupled. With amsgrad (Reddi et al., arXiv
    1904.09237), v under the root is replaced by its largest value so far.

    Args:
        decoupled: Whether weight decay acts on the parameters (AdamW) instead of the gradient, unless the parameter
            group specifies it.
    """

    def __init__(self, decoupled: bool) -> None:
        self.decoupled = decoupled

    def initial_state(self, theta: Tensor, hyperparameters: Hyperparameters) -> State:
        """Return zero moments."""
        names = [MEAN, SECOND_MOMENT, *([LARGEST] if hyperparameters.get("amsgrad") else [])]
        return {name: torch.zeros_like(theta) for name in names}

    @override
    def descend(
        self, theta: Tensor, state: State, h: Tensor, hyperparameters: Hyperparameters, step: int
    ) -> tuple[Tensor, State]:
        new_state = _new_state(state, h, hyperparameters)
        rate, correction = _corrections(hyperparameters, step)
        denominator = _root(new_state) / correction + hyperparameters["eps"]
        return add_quotient(theta, new_state[MEAN], denominator, -rate), new_state

    def preconditioner(self, state: State, hyperparameters: Hyperparameters, step: int) -> Tensor:
        """Return the reciprocal of the update's denominator."""
        return 1 / (_root(state) / _corrections(hyperparameters, step)[1] + hyperparameters["eps"])

    @override
    def pull_back(
        self, state: State, h: Tensor, hyperparameters: Hyperparameters, of_theta: Tensor, of_state: State, step: int
    ) -> tuple[Tensor, State]:
        beta1, beta2 = hyperparameters["betas.0"], hyperparameters["betas.1"]
        new_state = _new_state(state, h, hyperparameters)
        root = _root(new_state)
        rate, correction = _corrections(hyperparameters, step)
        # what depends only on the point has no query dimension yet: only what follows is expensive
        denominator = root / correction + hyperparameters["eps"]
        of_mean = -rate / denominator
        of_root = rate * new_state[MEAN] / (denominator.square() * correction)
        of_second_moment = of_root * slope_of_root(root)

        mean = torch.addcmul(of_state[MEAN], of_theta, of_mean)
        before: State = {}
        if LARGEST in state:
            largest = torch.addcmul(of_state[LARGEST], of_theta, of_second_moment)
            is_largest = new_state[SECOND_MOMENT] >= state[LARGEST]
            second_moment = of_state[SECOND_MOMENT] + is_largest * largest
            before[LARGEST] = ~is_largest * largest
        else:
            second_moment = torch.addcmul(of_state[SECOND_MOMENT], of_theta, of_second_moment)
        direction_cotangent = torch.addcmul(mean * (1 - beta1), second_moment, 2 * (1 - beta2) * h)
        before[MEAN], before[SECOND_MOMENT] = mean.mul_(beta1), second_moment.mul_(beta2)
        return direction_cotangent, before


def moments(state: State, h: Tensor, hyperparameters: Hyperparameters) -> State:
    """Return the new mean and second moment of the directions."""
    beta1, beta2 = hyperparameters["betas.0"], hyperparameters["betas.1"]
    return {
        MEAN: torch.lerp(state[MEAN], h, 1 - beta1),
        SECOND_MOMENT: add_product(state[SECOND_MOMENT] * beta2, h, h, 1 - beta2),
    }


def _new_state(state: State, h: Tensor, hyperparameters: Hyperparameters) -> State:
    new_state = moments(state, h, hyperparameters)
    if LARGEST in state:
        new_state[LARGEST] = torch.maximum(state[LARGEST], new_state[SECOND_MOMENT])
    return new_state


def _root(state: State) -> Tensor:
    """Return the square root of the second moment that the update divides by."""
    return state[LARGEST if LARGEST in state else SECOND_MOMENT].sqrt()


def _corrections(hyperparameters: Hyperparameters, step: int) -> tuple[Scale, Scale]:
    """Return the learning rate over the mean's bias correction, and the root of the second moment's correction."""
    rate = hyperparameters["lr"] / (1 - hyperparameters["betas.0"] ** (step + 1))
    return rate, (1 - hyperparameters["betas.1"] ** (step + 1)) ** 0.5
