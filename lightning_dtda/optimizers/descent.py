"""What optimizers share that descend the gradient with the sign and the weight decay that the user chose."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor
from typing_extensions import override

from lightning_dtda.optimizers.arithmetic import Scale, add_scaled, is_nonzero
from lightning_dtda.optimizers.update import Hyperparameters, State, Update


class Descent(Update):
    r"""An update of the direction :math:`h_t = \pm g_t + \gamma\theta_t`, minus with ``maximize``.

    Where the decay is decoupled (Loshchilov and Hutter, arXiv 1711.05101), the direction is :math:`\pm g_t`, and the
    update starts from :math:`(1 - \eta\gamma)\theta_t`.
    """

    decoupled: bool = False
    """Whether weight decay acts on the parameters and not on the gradient, where the parameter group does not say."""

    @abstractmethod
    def descend(
        self, theta: Tensor, state: State, h: Tensor, hyperparameters: Hyperparameters, step: int
    ) -> tuple[Tensor, State]:
        """Return parameters ``(..., P)`` and state after a step along h, from what decoupled decay left of theta."""

    @override
    def step(
        self, theta: Tensor, state: State, gradient: Tensor, hyperparameters: Hyperparameters, *, step: int
    ) -> tuple[Tensor, State]:
        h = self._direction(theta, gradient, hyperparameters)
        return self.descend(self._decayed(theta, hyperparameters), state, h, hyperparameters, step)

    @override
    def penalty(self, hyperparameters: Hyperparameters) -> float:
        return float(self._decays(hyperparameters)[0])

    @override
    def rate(self, hyperparameters: Hyperparameters, step: int) -> float:
        r"""Return :math:`\eta`, which it is for a mean of gradients too, whose weights sum up to one."""
        return float(hyperparameters["lr"])

    @override
    def decoupled_decay(self, hyperparameters: Hyperparameters, step: int) -> float:
        return float(hyperparameters["lr"]) * float(self._decays(hyperparameters)[1])

    def _decays(self, hyperparameters: Hyperparameters) -> tuple[Scale, Scale]:
        """Return the decay that is added to the gradient, and the one that acts on parameters; one of them is zero."""
        decay = hyperparameters["weight_decay"]
        return (0.0, decay) if hyperparameters.get("decoupled_weight_decay", self.decoupled) else (decay, 0.0)

    def _direction(self, theta: Tensor, gradient: Tensor, hyperparameters: Hyperparameters) -> Tensor:
        decay, _ = self._decays(hyperparameters)
        signed = -gradient if hyperparameters.get("maximize") else gradient
        return add_scaled(signed, theta, decay) if is_nonzero(decay) else signed

    def _decayed(self, theta: Tensor, hyperparameters: Hyperparameters) -> Tensor:
        r"""Return :math:`(1 - \eta\gamma)\theta_t` where the decay is decoupled, else :math:`\theta_t`; linear."""
        _, decay = self._decays(hyperparameters)
        return theta * (1 - hyperparameters["lr"] * decay) if is_nonzero(decay) else theta


class DescentWithAdjoint(Descent):
    """A :class:`Descent` that has an adjoint of its own, for speed."""

    @abstractmethod
    def pull_back(
        self, state: State, h: Tensor, hyperparameters: Hyperparameters, of_theta: Tensor, of_state: State, step: int
    ) -> tuple[Tensor, State]:
        """Return the cotangents of the direction and of the state before the step.

        Args:
            state: Before the step.
            h: The direction.
            hyperparameters: Of the step.
            of_theta: Cotangent of the parameters after it.
            of_state: Cotangents of the state after it.
            step: t.
        """

    @override
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
        h = self._direction(theta, gradient, hyperparameters)
        of_direction, before = self.pull_back(state, h, hyperparameters, theta_cotangent, state_cotangent, step)
        of_theta, (decay, _) = self._decayed(theta_cotangent, hyperparameters), self._decays(hyperparameters)
        if is_nonzero(decay):
            of_theta = add_scaled(of_theta, of_direction, decay)
        return of_theta, before, -of_direction if hyperparameters.get("maximize") else of_direction
