"""Base classes of optimizers that descend the gradient with a sign and a weight decay."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor
from typing_extensions import override

from lightning_dtda.optimizers.arithmetic import Scale, add_scaled, is_nonzero
from lightning_dtda.optimizers.update import Hyperparameters, State, Update


class Descent(Update):
    r"""An update along the direction :math:`h_t = \pm g_t + \gamma\theta_t`, with minus for ``maximize``.

    If the decay is decoupled (Loshchilov and Hutter, arXiv 1711.05101), the direction is :math:`\pm g_t` and the update
    starts from :math:`(1 - \eta\gamma)\theta_t`.
    """

    decoupled: bool = False
    """Whether weight decay acts on the parameters instead of the gradient, unless the parameter group specifies it."""

    @abstractmethod
    def descend(
        self, theta: Tensor, state: State, h: Tensor, hyperparameters: Hyperparameters, step: int
    ) -> tuple[Tensor, State]:
        """Return parameters ``(..., P)`` and state after a step along h; theta already has decoupled decay applied."""

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
        r"""Return :math:`\eta`, also for a mean of gradients, whose weights sum to one."""
        return float(hyperparameters["lr"])

    @override
    def decoupled_decay(self, hyperparameters: Hyperparameters, step: int) -> float:
        return float(hyperparameters["lr"]) * float(self._decays(hyperparameters)[1])

    def _decays(self, hyperparameters: Hyperparameters) -> tuple[Scale, Scale]:
        """Return the decay added to the gradient and the one applied to the parameters; at least one is zero."""
        decay = hyperparameters["weight_decay"]
        return (0.0, decay) if hyperparameters.get("decoupled_weight_decay", self.decoupled) else (decay, 0.0)

    def _direction(self, theta: Tensor, gradient: Tensor, hyperparameters: Hyperparameters) -> Tensor:
        decay, _ = self._decays(hyperparameters)
        signed = -gradient if hyperparameters.get("maximize") else gradient
        return add_scaled(signed, theta, decay) if is_nonzero(decay) else signed

    def _decayed(self, theta: Tensor, hyperparameters: Hyperparameters) -> Tensor:
        r"""Return :math:`(1 - \eta\gamma)\theta_t` if the decay is decoupled, else :math:`\theta_t`; linear."""
        _, decay = self._decays(hyperparameters)
        return theta * (1 - hyperparameters["lr"] * decay) if is_nonzero(decay) else theta


class DescentWithAdjoint(Descent):
    """A :class:`Descent` with a hand-written adjoint, for speed."""

    @abstractmethod
    def pull_back(
        self, state: State, h: Tensor, hyperparameters: Hyperparameters, of_theta: Tensor, of_state: State, step: int
    ) -> tuple[Tensor, State]:
        """Return the cotangents of the direction and of the state before the step.

        Args:
            state: State before the step.
            h: Direction of the step.
            hyperparameters: Hyperparameters at the step.
            of_theta: Cotangent of the parameters after the step.
            of_state: Cotangents of the state after the step.
            step: t, the number of steps taken before.
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
