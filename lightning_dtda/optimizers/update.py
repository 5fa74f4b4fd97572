"""The interface of an optimizer: one differentiable update of flat parameter vectors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lightning_dtda.compatibility import tree_map
from lightning_dtda.errors import AttributionError

State: TypeAlias = dict[str, Tensor]
"""Optimizer state of a parameter group, keyed by torch's names, e.g. ``momentum_buffer``, with the parameters flattened
and concatenated. Most entries are shaped like the parameters ``(..., P)``; a number that torch keeps for each parameter
but that is the same for all of them is kept once ``(..., 1)``."""

Hyperparameters: TypeAlias = Mapping[str, Any]
"""One parameter group's hyperparameters at one step: numbers, flags, or tensors that broadcast against the parameters.
A tuple becomes one entry per number: Adam's betas are ``betas.0`` and ``betas.1``. ``params`` holds the group's
parameters without their values (on the meta device), for their shapes and data type."""


class Update(ABC):
    r"""One optimizer's step and its adjoint, for one parameter group.

    The step is :math:`\theta_{t+1}, s_{t+1} = U_t(\theta_t, s_t, g_t)`. All vectors are flat, with any leading
    dimensions: ``(..., P)``, the parameters of the group concatenated. Implementations are pure functions and change
    nothing in place.

    A new optimizer needs :meth:`initial_state` and :meth:`step`. The :meth:`adjoint` comes from automatic
    differentiation unless the class overrides it: for speed, or if :meth:`step` is not differentiable everywhere. If
    the only problem is the square root of a second moment of zero, use
    :func:`~lightning_dtda.optimizers.arithmetic.root` instead. The :meth:`tangent` is the transpose of the adjoint.

    Attributes:
        rounding: Largest deviation of a step from that of the training, relative to the distance travelled, because the
            optimizer itself rounds more coarsely than the precision of the parameters.
    """

    rounding: float = 0.0

    @abstractmethod
    def initial_state(self, theta: Tensor, hyperparameters: Hyperparameters) -> State:
        """Return :math:`s_0`, the state before the first step; its keys determine which state is recorded later.

        Args:
            theta: Parameters ``(..., P)``; the state has the same leading dimensions.
            hyperparameters: Hyperparameters at the first step.
        """

    @abstractmethod
    def step(
        self, theta: Tensor, state: State, gradient: Tensor, hyperparameters: Hyperparameters, *, step: int
    ) -> tuple[Tensor, State]:
        """Apply :math:`U_t`, in the order of operations of torch's single-tensor implementation.

        Args:
            theta: Parameters before the step ``(..., P)``.
            state: Optimizer state before the step.
            gradient: Gradient as applied ``(..., P)``.
            hyperparameters: This group's hyperparameters at this step.
            step: t, the number of steps taken before; 0 for the first step.

        Returns:
            Parameters and state after the step.
        """

    def penalty(self, hyperparameters: Hyperparameters) -> float:
        r"""Return :math:`\gamma` if the step adds :math:`\gamma\theta` to the gradient of the loss that it descends.

        The training then minimises :math:`L + \frac\gamma2 \lVert\theta\rVert^2`, where L is minus the loss with
        ``maximize``. Zero unless the class overrides it: a decoupled decay is not part of any objective.
        """
        return 0.0

    def rate(self, hyperparameters: Hyperparameters, step: int) -> float:
        """Return how far a gradient moves the parameters in total, at this step and through momentum at later ones.

        :meth:`preconditioner` gives the direction of the move.

        Raises:
            AttributionError: If the class does not define it.
        """
        raise AttributionError(
            f"{type(self).__name__} does not define how far a gradient moves the parameters. Implement rate() in this "
            "class (see lightning_dtda.optimizers.Update), or use UnrolledDifferentiation()."
        )

    def preconditioner(self, state: State, hyperparameters: Hyperparameters, step: int) -> Tensor | None:
        """Return the elementwise factor ``(..., P)`` of the gradient in the step besides the rate; ``None`` means one.

        Args:
            state: Optimizer state after the step.
            hyperparameters: Hyperparameters at the step.
            step: t, the number of steps taken before.
        """
        return None

    def decoupled_decay(self, hyperparameters: Hyperparameters, step: int) -> float:
        """Return the fraction of the parameters that the step subtracts independently of the gradient."""
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

        This covers only the direct dependence on :math:`\theta_t`. The dependence of the gradient on the parameters is
        a Hessian product, which is left to the caller. The cotangents may have more entries in a leading dimension
        (queries) than the point.

        Returns:
            Cotangents of the parameters, the state and the gradient, shaped like them.
        """
        (_, after), pull_back = torch.func.vjp(  # type: ignore[misc]
            lambda theta, state, gradient: self.step(theta, state, gradient, hyperparameters, step=step),
            theta,
            state,
            gradient,
        )
        # torch keeps some numbers in a different data type
        cotangents = theta_cotangent, {key: state_cotangent[key].to(part.dtype) for key, part in after.items()}
        before: tuple[Tensor, State, Tensor]
        if theta.shape == theta_cotangent.shape:
            before = pull_back(cotangents)
            return before
        # what depends only on the point has no query dimension and is computed once
        if theta.ndim < theta_cotangent.ndim:
            before = torch.vmap(pull_back)(cotangents)
            return before
        # not with in_dims and out_dims: torch crashes if a result is the same for all queries
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

        Computed as the transpose of :meth:`adjoint`, which is linear in its cotangents. Each optimizer thus has only
        one derivative, and it is finite wherever :meth:`adjoint` is: even at a second moment of zero, where
        forward-mode differentiation of :meth:`step` is not.

        Returns:
            Tangents of the parameters and the state after the step. They may have more entries in a leading dimension
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
