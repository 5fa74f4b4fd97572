"""Follows the steps of a training: what each was made of, known piece by piece at different hooks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_dtda.errors import RecordingError
from lightning_dtda.optimizers import State
from lightning_dtda.recording import checks
from lightning_dtda.recording.configuration import hyperparameter_values
from lightning_dtda.replay.random_states import random_states
from lightning_dtda.trajectory import MicroBatch, ParameterLayout


@dataclass(frozen=True)
class TakenStep:
    """An optimizer step that was just taken.

    Args:
        micro_batches: The passes whose gradients it applied.
        gradients: As the optimizer applied them, in the layout's order.
        hyperparameters: The numbers of each parameter group at this very step.
        accumulate_grad_batches: What Lightning divided the losses by.
    """

    micro_batches: list[MicroBatch]
    gradients: list[Tensor]
    hyperparameters: list[list[float]]
    accumulate_grad_batches: int


class StepWatch:
    """Gathers a step's pieces from the hooks at which they are known, and tells of it once it is taken.

    Args:
        module: The module.
        optimizer: Its optimizer.
        layout: The trained parameters.
        hyperparameter_names: Of the numbers that are told at each step.
        state_names: Of what the optimizer keeps, by parameter group.
        taken: Called after each step.
        steps: Number of steps taken before.
    """

    def __init__(
        self,
        *,
        module: pl.LightningModule,
        optimizer: Optimizer,
        layout: ParameterLayout,
        hyperparameter_names: list[str],
        state_names: list[tuple[str, ...]],
        taken: Callable[[TakenStep], None],
        steps: int = 0,
    ) -> None:
        self.parameters = [module.get_parameter(name) for name in layout.names]
        self.steps = steps
        self._layout = layout
        self._module = module
        self._optimizer = optimizer
        self._identities = list(map(id, self.parameters))
        self._names = hyperparameter_names
        self._state_names = state_names
        self._taken = taken
        self._pending: list[MicroBatch] = []
        self._current: MicroBatch | None = None
        self._accumulate_grad_batches = 1
        self._last_applied: list[list[float]] | None = None
        self._handle: RemovableHandle = optimizer.register_step_post_hook(self._after_step)

    @property
    def is_between_steps(self) -> bool:
        """Whether no micro-batch of the next step has been passed through the module yet."""
        return not self._pending

    def begin_micro_batch(
        self, indices: Tensor, epoch: int, batch_idx: int, leaves: tuple[Tensor, ...], accumulate_grad_batches: int
    ) -> None:
        """Note what is about to be passed through the module."""
        self._current = MicroBatch(indices, epoch, batch_idx, random_states(self._module.device), leaves)
        self._accumulate_grad_batches = accumulate_grad_batches

    def drop_pending(self) -> None:
        """Forget the micro-batches whose gradients are being thrown away."""
        self._pending = []

    def add_micro_batch(self) -> None:
        """Add the micro-batch to the step: its loss is about to be differentiated.

        Not before: a micro-batch for which ``training_step`` returns ``None`` contributes nothing.
        """
        assert self._current is not None
        before, after = self._current.rng_states, random_states(self._module.device)
        drew = any(not torch.equal(before[device], after[device]) for device in before)
        self._pending.append(self._current if drew else replace(self._current, rng_states={}))

    def states(self) -> list[State]:
        """Copy the optimizer's state, flat for each parameter group; none before the first step."""
        states: list[State] = []
        start = 0
        for names, length in zip(self._state_names, self._layout.group_lengths, strict=True):
            group = self.parameters[start : start + length]
            start += length
            states.append(
                {
                    key: torch.cat([self._optimizer.state[parameter][key].detach().reshape(-1) for parameter in group])
                    for key in (names if self.steps else ())
                }
            )
        return states

    def close(self) -> None:
        """Follow no more steps."""
        self._handle.remove()

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # the gradient is what was applied, and the learning rate that of this step, only here: before the step the
        # gradient is not yet clipped, after the batch the scheduler has moved on
        trained = (p for group in optimizer.param_groups for p in group["params"] if p.requires_grad)
        if list(map(id, trained)) != self._identities:
            raise RecordingError(
                f"Other parameters are trained at step {self.steps} than at the start. Train the same ones throughout: "
                "no parameters frozen, unfrozen or added in mid-training."
            )
        gradients = []
        for name, parameter in zip(self._layout.names, self.parameters, strict=True):
            if parameter.grad is None:
                raise RecordingError(
                    f"Parameter {name} got no gradient at step {self.steps}: it took no part in the loss, or "
                    "training_step returned None. Freeze it (requires_grad=False) before the optimizer is made, or "
                    "let the loss use it."
                )
            gradients.append(parameter.grad)
        applied = hyperparameter_values(optimizer, self._names)
        if applied != self._last_applied and checks.state_names(optimizer) != self._state_names:
            raise RecordingError(
                f"The hyperparameters of step {self.steps} need another optimizer state than those of the first step "
                f"(momentum switched on or off?): {dict(zip(self._names, applied[0], strict=True))}. Keep it on "
                "throughout, if need be with a tiny value."
            )
        self._last_applied = applied
        step = TakenStep(self._pending, gradients, applied, self._accumulate_grad_batches)
        self._pending = []
        self.steps += 1
        self._taken(step)
