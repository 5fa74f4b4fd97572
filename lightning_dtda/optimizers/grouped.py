"""An update of the whole parameter vector, with separate hyperparameters for each parameter group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_dtda.errors import TrajectoryError
from lightning_dtda.optimizers.update import Hyperparameters, State, Update


@dataclass(frozen=True)
class GroupedUpdate:
    """One optimizer over several parameter groups.

    Args:
        update: The optimizer's update for one group.
        slices: Slice of each group in the flat vector ``(..., P)``.
        parameters: Parameters of each group without their values, because an update may need their shapes.
    """

    update: Update
    slices: tuple[slice, ...]
    parameters: tuple[tuple[Tensor, ...], ...]

    def initial_states(self, theta: Tensor, hyperparameters: Sequence[Hyperparameters]) -> list[State]:
        """Return each group's optimizer state before the first step."""
        arguments = self._of_groups(theta, self._settings(hyperparameters))
        return [self.update.initial_state(*own) for own in arguments]

    def step(
        self,
        theta: Tensor,
        states: Sequence[State],
        gradient: Tensor,
        hyperparameters: Sequence[Hyperparameters],
        *,
        step: int,
    ) -> tuple[Tensor, list[State]]:
        """Apply one optimizer step to ``theta`` ``(..., P)`` and each group's state."""
        arguments = self._of_groups(theta, states, gradient, self._settings(hyperparameters))
        results = [self.update.step(*own, step=step) for own in arguments]
        return _join([theta for theta, _ in results]), [state for _, state in results]

    def adjoint(
        self,
        theta: Tensor,
        states: Sequence[State],
        gradient: Tensor,
        hyperparameters: Sequence[Hyperparameters],
        theta_cotangent: Tensor,
        state_cotangents: Sequence[State],
        *,
        step: int,
    ) -> tuple[Tensor, list[State], Tensor]:
        """Pull cotangents ``(..., P)`` back through one step, to the parameters, the states and the gradient."""
        arguments = self._of_groups(
            theta, states, gradient, self._settings(hyperparameters), theta_cotangent, state_cotangents
        )
        results = [self.update.adjoint(*own, step=step) for own in arguments]
        thetas, new_states, gradients = zip(*results, strict=True)
        return _join(thetas), list(new_states), _join(gradients)

    def tangent(
        self,
        theta: Tensor,
        states: Sequence[State],
        gradient: Tensor,
        hyperparameters: Sequence[Hyperparameters],
        theta_tangent: Tensor,
        state_tangents: Sequence[State],
        gradient_tangent: Tensor,
        *,
        step: int,
    ) -> tuple[Tensor, list[State]]:
        """Push tangents ``(..., P)`` forward through one step, to the parameters and the states after it."""
        arguments = self._of_groups(
            theta, states, gradient, self._settings(hyperparameters), theta_tangent, state_tangents, gradient_tangent
        )
        results = [self.update.tangent(*own, step=step) for own in arguments]
        return _join([theta for theta, _ in results]), [state for _, state in results]

    def preconditioner(
        self, states: Sequence[State], hyperparameters: Sequence[Hyperparameters], *, step: int
    ) -> Tensor | None:
        """Return the elementwise factor ``(..., P)`` of the gradient in the step besides the rate; ``None`` means one.

        Args:
            states: State of each group after the step.
            hyperparameters: Hyperparameters of each group at the step.
            step: t, the number of steps taken before.
        """
        found = [
            self.update.preconditioner(state, group, step) for state, group in zip(states, hyperparameters, strict=True)
        ]
        return None if found[0] is None else _join([part for part in found if part is not None])

    def by_parameter(self, of_groups: Tensor) -> Tensor:
        """Repeat one number per group ``(groups,)`` for each entry of its parameters ``(P,)``."""
        sizes = torch.tensor([part.stop - part.start for part in self.slices], device=of_groups.device)
        return of_groups.repeat_interleave(sizes)

    def _of_groups(self, *arguments: Tensor | Sequence[Any]) -> Iterator[list[Any]]:
        """Yield each group's slice of vectors ``(..., P)``, and its element of lists with one element per group."""
        for number, part in enumerate(self.slices):
            yield [each[..., part] if isinstance(each, Tensor) else each[number] for each in arguments]

    def _settings(self, hyperparameters: Sequence[Hyperparameters]) -> list[Hyperparameters]:
        return [
            _Settings({**group, "params": parameters})
            for group, parameters in zip(hyperparameters, self.parameters, strict=True)
        ]


class _Settings(dict[str, Any]):
    def __missing__(self, name: str) -> Any:
        raise TrajectoryError(f"The optimizer needs {name}, which was not recorded. Record the run again.")


def _join(parts: Sequence[Tensor]) -> Tensor:
    # with one group there is nothing to join, and copying the adjoints of all runs and queries takes as long as a layer
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=-1)
