"""What an optimizer is to us: one differentiable update of flat parameter vectors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, TypeAlias

from torch import Tensor

State: TypeAlias = dict[str, Tensor]
"""The optimizer's state by torch's own names, e.g. ``momentum_buffer``; each tensor is shaped like the parameters."""

Hyperparameters: TypeAlias = Mapping[str, "float | Tensor | bool"]
"""One parameter group's hyperparameters at one step; tensors broadcast against the parameters."""


class Update(Protocol):
    r"""One optimizer's step and its adjoint, for one parameter group.

    The step is :math:`\theta_{t+1}, s_{t+1} = U_t(\theta_t, s_t, g_t)`. All vectors are flat, with any leading
    dimensions: ``(..., P)``. Implementations are pure functions; nothing is changed in place.
    """

    def initial_state(self, theta: Tensor, hyperparameters: Hyperparameters) -> State:
        """Return :math:`s_0`, the state before the first step."""
        ...

    def step(
        self, theta: Tensor, state: State, gradient: Tensor, hyperparameters: Hyperparameters, *, first: bool
    ) -> tuple[Tensor, State]:
        """Apply :math:`U_t`, in the order of operations of torch's single-tensor implementation.

        Args:
            theta: Parameters before the step ``(..., P)``.
            state: Optimizer state before the step.
            gradient: The gradient as applied ``(..., P)``.
            hyperparameters: This group's hyperparameters at this very step.
            first: Whether this is step 0 (some optimizers initialise their state from the first gradient).
        """
        ...

    def adjoint(
        self,
        theta: Tensor,
        state: State,
        gradient: Tensor,
        hyperparameters: Hyperparameters,
        theta_cotangent: Tensor,
        state_cotangent: State,
        *,
        first: bool,
    ) -> tuple[Tensor, State, Tensor]:
        r"""Pull cotangents of :math:`(\theta_{t+1}, s_{t+1})` back to :math:`(\theta_t, s_t, g_t)`.

        The direct dependence on :math:`\theta_t` only; that of the gradient on the parameters is the caller's
        Hessian product.

        Returns:
            Cotangents of the parameters, the state and the gradient, each ``(..., P)``.
        """
        ...
