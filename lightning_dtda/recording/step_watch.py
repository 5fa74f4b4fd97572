"""Follows the steps of a training, whose parts become known at different hooks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from lightning_dtda.replay.random_states import Generators, drawn_from
from lightning_dtda.trajectory import MicroBatch, ParameterLayout


@dataclass(frozen=True)
class TakenStep:
    """An optimizer step that was just taken.

    Args:
        micro_batches: Micro-batches whose gradients the step applied.
        hyperparameters: Numeric hyperparameters of each parameter group at this step.
        accumulate_grad_batches: Number that Lightning divided the losses by.
    """

    micro_batches: list[MicroBatch]
    hyperparameters: list[list[float]]
    accumulate_grad_batches: int


class StepWatch:
    """Collects the parts of a step from different hooks, and reports the step once it is taken.

    Args:
        module: The module.
        optimizer: Optimizer of the module.
        layout: Layout of the trained parameters.
        hyperparameter_names: Names of the numbers to report at each step.
        applying: Function that is called with the gradient that a step is about to apply, in the layout's order: after
            clipping, and before the optimizer changes it.
        taken: Function that is called after each step.
        steps: Number of steps taken before.
    """

    def __init__(
        self,
        *,
        module: pl.LightningModule,
        optimizer: Optimizer,
        layout: ParameterLayout,
        hyperparameter_names: list[str],
        applying: Callable[[list[Tensor]], None],
        taken: Callable[[TakenStep], None],
        steps: int = 0,
    ) -> None:
        self.parameters = [module.get_parameter(name) for name in layout.names]
        self.steps = steps
        self._layout = layout
        self._generators = Generators(module, module.device)
        self._optimizer = optimizer
        self._identities = list(map(id, self.parameters))
        self._known = set(self._identities)
        self._names = hyperparameter_names
        self._state_sizes = checks.state_sizes(optimizer, self.parameters)
        self._applying = applying
        self._taken = taken
        self._pending: list[MicroBatch] = []
        self._current: MicroBatch | None = None
        self._accumulate_grad_batches = 1
        self._last_applied: list[list[float]] | None = None
        self._handles: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    @property
    def is_between_steps(self) -> bool:
        """Whether no micro-batch of the next step has been passed through the module yet."""
        return not self._pending

    @property
    def gradients(self) -> list[Tensor] | None:
        """The current gradient; ``None`` if a part is missing, in which case the step is refused once it is taken."""
        found = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        return found if len(found) == len(self.parameters) else None

    def begin_micro_batch(self, batch: MicroBatch, accumulate_grad_batches: int) -> None:
        """Note the micro-batch that is about to be passed through the module, with the states of all generators."""
        self._current = batch
        self._accumulate_grad_batches = accumulate_grad_batches

    def drop_pending(self) -> None:
        """Forget the micro-batches whose gradients are being discarded."""
        self._pending = []

    def add_micro_batch(self) -> None:
        """Add the current micro-batch to the step; its loss is about to be differentiated.

        Not earlier, because a micro-batch for which ``training_step`` returns ``None`` contributes nothing.
        """
        assert self._current is not None
        states = drawn_from(self._current.rng_states, self._generators.states())
        self._pending.append(replace(self._current, rng_states=states))

    def states(self) -> list[State]:
        """Copy the optimizer's state, flattened for each parameter group; empty before the first step."""
        states: list[State] = []
        start = 0
        for sizes, length in zip(self._state_sizes, self._layout.group_lengths, strict=True):
            group = self.parameters[start : start + length]
            start += length
            states.append({key: self._state(key, group)[:size] for key, size in sizes.items() if self.steps})
        return states

    def _state(self, key: str, group: Sequence[Tensor]) -> Tensor:
        """Concatenate one entry of the optimizer's state over the parameters that have it."""
        found = [(parameter, self._optimizer.state[parameter].get(key)) for parameter in group]
        parts = [
            torch.as_tensor(part, device=parameter.device).detach().reshape(-1)
            for parameter, part in found
            if part is not None
        ]
        return torch.cat(parts) if parts else self.parameters[0].new_empty(0)

    def close(self) -> None:
        """Stop following steps."""
        for handle in self._handles:
            handle.remove()

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        # the gradient is clipped only at the end of the closure, which the optimizer calls, and some optimizers then
        # overwrite it (SGD with Nesterov momentum on a GPU): in between, it is the gradient that is applied
        if (closure := kwargs.get("closure")) is not None:
            return args, {**kwargs, "closure": self._noting(closure)}
        if len(args) > 1 and args[1] is not None:
            return (args[0], self._noting(args[1]), *args[2:]), kwargs
        self._note_gradient()
        return None

    def _noting(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def noting() -> Any:
            loss = closure()
            self._note_gradient()
            return loss

        return noting

    def _note_gradient(self) -> None:
        if (gradients := self.gradients) is not None:
            self._applying(gradients)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # read the learning rate of this step here: after the batch, the scheduler has already changed it
        given = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        if all(parameter.grad is None for parameter in given):
            self._pending = []  # training_step returned None: no step was taken
            return
        # parameters that the loss does not use have no gradient, and stay unchanged
        trained = [id(parameter) for parameter in given if parameter.grad is not None]
        if not self._known.issuperset(trained) or [id(p) for p in given if id(p) in self._known] != self._identities:
            raise RecordingError(
                f"The parameters trained at step {self.steps} differ from those at the start. Train the same ones "
                "throughout: do not freeze, unfreeze or add parameters during training."
            )
        for name, parameter in zip(self._layout.names, self.parameters, strict=True):
            if parameter.grad is None:
                raise RecordingError(
                    f"Parameter {name} has no gradient at step {self.steps}, but had one at the first step: the loss "
                    "does not always use it. Let the loss use it at every step (a term that is zero is enough), or "
                    "freeze it (requires_grad=False) before the optimizer is created."
                )
        applied = hyperparameter_values(optimizer, self._names)
        if applied != self._last_applied and checks.state_sizes(optimizer, self.parameters) != self._state_sizes:
            raise RecordingError(
                f"The hyperparameters of step {self.steps} need a different optimizer state than those of the first "
                f"step (momentum switched on or off?): {dict(zip(self._names, applied[0], strict=True))}. Keep "
                "momentum on throughout; a tiny value is enough."
            )
        self._last_applied = applied
        step = TakenStep(self._pending, applied, self._accumulate_grad_batches)
        self._pending = []
        self.steps += 1
        self._taken(step)
