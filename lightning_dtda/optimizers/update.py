"""What an optimizer is to us: one differentiable update of flat parameter vectors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from lightning_dtda.errors import AttributionError

State: TypeAlias = dict[str, Tensor]
"""The optimizer's state of a parameter group, by torch's own names, e.g. ``momentum_buffer``: what it keeps of each
parameter, flat and one after the other. Most is shaped like the parameters ``(..., P)``; a number that torch keeps for
each parameter, but that is the same for all of them, is kept once ``(..., 1)``."""

Hyperparameters: TypeAlias = Mapping[str, Any]
"""One parameter group's hyperparameters at one step: numbers, flags, or tensors that broadcast against the parameters.
A tuple is spread to one entry for each of its numbers: Adam's betas are ``betas.0`` and ``betas.1``. Under ``params``
stand the group's parameters, without their values (on the meta device): their shapes and their data type."""


class Update(ABC):
    r"""One optimizer's step and its adjoint, for one parameter group.

    The step is :math:`\theta_{t+1}, s_{t+1} = U_t(\theta_t, s_t, g_t)`. All vectors are flat, with any leading
    dimensions: ``(..., P)``, the parameters of the group one after the other. Implementations are pure functions;
    nothing is changed in place.

    A new optimizer needs :meth:`initial_state` and :meth:`step`. Its :meth:`adjoint` is had by automatic
    differentiation unless the class has its own: for speed, or where :meth:`step` has no derivative on the way. For the
    square root of a second moment of zero, it is enough to take that of
    :func:`~lightning_dtda.optimizers.arithmetic.root`. Its :meth:`tangent` is the transpose of the adjoint.

    Attributes:
        rounding: How far steps may be from those of the training, relative to the distance travelled, because the
            optimizer itself rounds more coarsely than the parameters do.
    """

    rounding: float = 0.0

    @abstractmethod
    def initial_state(self, theta: Tensor, hyperparameters: Hyperparameters) -> State:
        """Return :math:`s_0`, the state before the first step; its keys are what is recorded of the state later on.

        Args:
            theta: Parameters ``(..., P)``; their leading dimensions are the state's.
            hyperparameters: Of the first step.
        """

    @abstractmethod
    def step(
        self, theta: Tensor, state: State, gradient: Tensor, hyperparameters: Hyperparameters, *, step: int
    ) -> tuple[Tensor, State]:
        """Apply :math:`U_t`, in the order of operations of torch's single-tensor implementation.

        Args:
            theta: Parameters before the step ``(..., P)``.
            state: Optimizer state before the step.
            gradient: The gradient as applied ``(..., P)``.
            hyperparameters: This group's hyperparameters at this very step.
            step: t, the number of steps taken before; 0 is the first.

        Returns:
            Parameters and state after the step.
        """

    def penalty(self, hyperparameters: Hyperparameters) -> float:
        r"""Return :math:`\gamma` where the step adds :math:`\gamma\theta` to the gradient of the loss that it descends.

        It is then :math:`L + \frac\gamma2 \lVert\theta\rVert^2` that is minimised, L being minus the loss with
        ``maximize``. Zero unless the class says otherwise: a decay that acts on parameters beside the gradient is no
        part of any objective.
        """
        return 0.0

    def rate(self, hyperparameters: Hyperparameters, step: int) -> float:
        """Return how far a gradient moves the parameters in all, at this step and by momentum in later ones.

        Its direction apart, see :meth:`preconditioner`.

        Raises:
            AttributionError: Unless the class says it.
        """
        raise AttributionError(
            f"{type(self).__name__} does not say how far a gradient moves the parameters. Give its class the method "
            "rate() (see lightning_dtda.optimizers.Update), or use UnrolledDifferentiation()."
        )

    def preconditioner(self, state: State, hyperparameters: Hyperparameters, step: int) -> Tensor | None:
        """Return what the step multiplies gradients by beside the rate, entry by entry ``(..., P)``; ``None`` is one.

        Args:
            state: The optimizer's state after the step.
            hyperparameters: Of the step.
            step: t.
        """
        return None

    def decoupled_decay(self, hyperparameters: Hyperparameters, step: int) -> float:
        """Return the share of the parameters that the step takes away beside the gradient's."""
        return 0.0

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
        r"""Pull cotangents of :math:`(\theta_{t+1}, s_{t+1})` back to :math:`(\theta_t, s_t, g_t)`.

        The direct dependence on :math:`\theta_t` only; that of the gradient on the parameters is the caller's
        Hessian product. The cotangents may have more entries in a leading dimension (queries) than the point.

        Returns:
            Cotangents of the parameters, the state and the gradient, each shaped like these.
        """
        (_, after), pull_back = torch.func.vjp(  # type: ignore[misc]
            lambda theta, state, gradient: self.step(theta, state, gradient, hyperparameters, step=step),
            theta,
            state,
            gradient,
        )
        # torch keeps some numbers in a data type of their own
        cotangents = theta_cotangent, {key: state_cotangent[key].to(part.dtype) for key, part in after.items()}
        before: tuple[Tensor, State, Tensor]
        if theta.shape == theta_cotangent.shape:
            before = pull_back(cotangents)
            return before
        # all that depends on the point alone has no dimension of queries: it is computed once
        if theta.ndim < theta_cotangent.ndim:
            before = torch.vmap(pull_back)(cotangents)
            return before
        # not by in_dims and out_dims: torch crashes where a result is the same for all queries
        found = torch.vmap(pull_back)(tree_map(lambda part: part.movedim(-2, 0).unsqueeze(-2), cotangents))
        before = tree_map(lambda part: part.squeeze(-2).movedim(0, -2), found)
        return before

    def tangent(
        self,
        theta: Tensor,
        state: State,
        gradient: Tensor,
        hyperparameters: Hyperparameters,
        theta_tangent: Tensor,
        state_tangent: State,
        gradient_tangent: Tensor,
        *,
        step: int,
    ) -> tuple[Tensor, State]:
        r"""Push tangents of :math:`(\theta_t, s_t, g_t)` forward to :math:`(\theta_{t+1}, s_{t+1})`.

        .. math:: \langle \dot U, \bar u \rangle = \langle (\dot\theta, \dot s, \dot g), U^\top \bar u \rangle
            \quad \text{for all } \bar u

        The transpose of :meth:`adjoint`, which is linear in its cotangents. So there is one derivative of each
        optimizer: finite where :meth:`adjoint` is, at a second moment of zero too, where forward-mode differentiation
        of :meth:`step` is not.

        Returns:
            Tangents of the parameters and the state after the step, which may have more entries in a leading dimension
            (removals) than the point.
        """
        before, transpose = torch.func.vjp(  # type: ignore[misc]
            lambda *cotangents: self.adjoint(theta, state, gradient, hyperparameters, *cotangents, step=step),
            torch.zeros_like(theta_tangent),
            {key: torch.zeros_like(tangent) for key, tangent in state_tangent.items()},
        )
        ordered = {key: state_tangent[key].to(part.dtype) for key, part in before[1].items()}
        after: tuple[Tensor, State] = transpose((theta_tangent, ordered, gradient_tangent))
        return after
