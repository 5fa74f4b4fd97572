"""``torch.optim.NAdam``: Adam with Nesterov momentum that grows from step to step."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from lightning_dtda.optimizers.adam import MEAN, SECOND_MOMENT, moments
from lightning_dtda.optimizers.arithmetic import add_quotient, root, same_for_all, scalar_dtype
from lightning_dtda.optimizers.descent import Descent
from lightning_dtda.optimizers.update import Hyperparameters, State

MU_PRODUCT = "mu_product"


class NAdam(Descent):
    r"""NAdam (Dozat, *Incorporating Nesterov Momentum into Adam*, 2016, algorithm 2) as torch computes it.

    With Adam's moments :math:`m_{t+1}, v_{t+1}` of the directions :math:`h_t`, and momentum decay :math:`\psi`:

    .. math::
        \mu_t = \beta_1 \left(1 - \tfrac12 \, 0.96^{(t + 1) \psi}\right), \qquad
        \theta_{t+1} = (1 - \eta\gamma)\theta_t - \frac{\eta}{\sqrt{v_{t+1} / (1 - \beta_2^{t+1})} + \epsilon}
        \left(\frac{(1 - \mu_t) h_t}{1 - \prod_{s \le t} \mu_s}
        + \frac{\mu_{t+1} m_{t+1}}{1 - \prod_{s \le t + 1} \mu_s}\right),

    with the factor :math:`1 - \eta\gamma` only if the decay is decoupled.
    """

    def initial_state(self, theta: Tensor, hyperparameters: Hyperparameters) -> State:
        """Return zero moments and a product of one."""
        product = torch.ones(*theta.shape[:-1], 1, dtype=scalar_dtype(), device=theta.device)
        return {MEAN: torch.zeros_like(theta), SECOND_MOMENT: torch.zeros_like(theta), MU_PRODUCT: product}

    @override
    def descend(
        self, theta: Tensor, state: State, h: Tensor, hyperparameters: Hyperparameters, step: int
    ) -> tuple[Tensor, State]:
        rate, beta1, beta2 = hyperparameters["lr"], hyperparameters["betas.0"], hyperparameters["betas.1"]
        decay = hyperparameters["momentum_decay"]
        now, later = (beta1 * (1.0 - 0.5 * 0.96 ** (t * decay)) for t in (step + 1, step + 2))
        product = state[MU_PRODUCT].detach()
        product = (product.to(scalar_dtype()) * now).to(product.dtype)  # rounded as in torch, in a double replay too
        new_state = moments(state, h, hyperparameters) | {MU_PRODUCT: product}
        so_far = same_for_all(product, theta.dtype)
        denominator = root(new_state[SECOND_MOMENT] / (1 - beta2 ** (step + 1))) + hyperparameters["eps"]
        moved = add_quotient(theta, h, denominator, -rate * (1.0 - now) / (1.0 - so_far))
        return add_quotient(moved, new_state[MEAN], denominator, -rate * later / (1.0 - so_far * later)), new_state

    def preconditioner(self, state: State, hyperparameters: Hyperparameters, step: int) -> Tensor:
        """Return the reciprocal of the update's denominator."""
        corrected = state[SECOND_MOMENT] / (1 - hyperparameters["betas.1"] ** (step + 1))
        return 1 / (corrected.sqrt() + hyperparameters["eps"])
