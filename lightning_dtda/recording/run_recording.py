"""One run under way: the pieces of its steps, gathered and handed to the writer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_dtda.errors import RecordingError
from lightning_dtda.recording import checks
from lightning_dtda.recording.configuration import hyperparameter_values
from lightning_dtda.recording.shard_buffer import ShardBuffer
from lightning_dtda.replay.random_states import random_states
from lightning_dtda.trajectory import MicroBatch, ParameterLayout, RunWriter


class RunRecording:
    """One run under way: gathers a step's pieces from the hooks at which they are known.

    Args:
        module: The module.
        optimizer: Its optimizer.
        layout: The recorded parameters.
        writer: Writes the run, or the part of it that this process sees.
        hyperparameter_names: Of what is recorded at each step.
        state_names: Of what the optimizer keeps, by parameter group.
        buffer: Collects the steps from the first one on.
        interval: Steps between checkpoints; ``None`` where another process writes them.
        checkpointed: Whether the first step's checkpoint is there already.
    """

    def __init__(
        self,
        *,
        module: pl.LightningModule,
        optimizer: Optimizer,
        layout: ParameterLayout,
        writer: RunWriter,
        hyperparameter_names: list[str],
        state_names: list[tuple[str, ...]],
        buffer: ShardBuffer,
        interval: int | None,
        checkpointed: bool = False,
    ) -> None:
        self.layout = layout
        self._module = module
        self._optimizer = optimizer
        self._parameters = [module.get_parameter(name) for name in layout.names]
        self._identities = list(map(id, self._parameters))
        self._writer = writer
        self._names = hyperparameter_names
        self._state_names = state_names
        self._buffer = buffer
        self._interval = interval
        self.steps = buffer.first_step
        self._pending: list[MicroBatch] = []
        self._current: MicroBatch | None = None
        self._accumulate_grad_batches = 1
        self._last_applied: list[list[float]] | None = None
        self._last_checkpoint = self.steps
        if interval is not None and not checkpointed:
            self._checkpoint()
        self._handle: RemovableHandle = optimizer.register_step_post_hook(self._after_step)

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

    def before_clipping(self) -> None:
        """Note what is lost when the gradient is scaled to a norm."""
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        if len(gradients) == len(self._parameters):  # else the step is refused when it is taken
            self._buffer.put_norm(gradients)

    def sync(self) -> None:
        """Wait until every step so far is on disk."""
        self._flush()
        self._writer.sync()

    def close(self, status: Literal["complete", "incomplete"], reason: str | None) -> None:
        """Write what is left and the end of the run; one that stops before its first step leaves nothing."""
        self._handle.remove()
        if status == "incomplete" and self.steps == 0:
            self._writer.discard()
            return
        try:
            if self._interval is not None and status == "complete" and self._last_checkpoint != self.steps:
                self._checkpoint()
            else:  # stopped in mid-step, perhaps: whole steps only, and no parameters that belong to none
                self._flush()
        finally:
            self._writer.close(status, reason)

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
        for name, parameter in zip(self.layout.names, self._parameters, strict=True):
            if parameter.grad is None:
                raise RecordingError(
                    f"Parameter {name} got no gradient at step {self.steps}: it took no part in the loss, or "
                    "training_step returned None. Freeze it (requires_grad=False) before the optimizer is made, or "
                    "let the loss use it."
                )
            gradients.append(parameter.grad)
        self._buffer.put_gradient(gradients)
        applied = hyperparameter_values(optimizer, self._names)
        if applied != self._last_applied and checks.state_names(optimizer) != self._state_names:
            raise RecordingError(
                f"The hyperparameters of step {self.steps} need another optimizer state than those of the first step "
                f"(momentum switched on or off?): {dict(zip(self._names, applied[0], strict=True))}. Keep it on "
                "throughout, if need be with a tiny value."
            )
        self._last_applied = applied
        self._buffer.append(self._pending, applied, self._accumulate_grad_batches)
        self._pending = []
        self.steps += 1
        if self._interval is not None and self.steps % self._interval == 0:
            self._checkpoint()
        elif self._buffer.is_full:
            self._flush()

    def _flush(self) -> None:
        if len(self._buffer):
            self._writer.add_shard(*self._buffer.take())

    def _checkpoint(self) -> None:
        self._flush()
        tensors: dict[str, Tensor] = {
            f"parameters.{name}": parameter for name, parameter in zip(self.layout.names, self._parameters, strict=True)
        }
        start = 0
        for number, length in enumerate(self.layout.group_lengths):
            group = self._parameters[start : start + length]
            start += length
            for key in self._state_names[number] if self.steps else ():
                parts = [self._optimizer.state[parameter][key].reshape(-1) for parameter in group]
                tensors[f"state.{number}.{key}"] = torch.cat(parts)
        tensors |= {
            f"buffers.{name}": buffer for name, buffer in buffers(self._module, self.layout, self.steps).items()
        }
        # the copy must be taken now: the next step changes the parameters in place
        self._writer.add_checkpoint(
            self.steps, {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        )
        self._last_checkpoint = self.steps


def buffers(module: pl.LightningModule, layout: ParameterLayout, step: int) -> dict[str, Tensor]:
    """Return the buffers, and at the start the frozen parameters, which no later checkpoint repeats."""
    found = dict(module.named_buffers())
    if step == 0:
        trained = set(layout.names)
        found |= {name: p.detach() for name, p in module.named_parameters() if name not in trained}
    return found
