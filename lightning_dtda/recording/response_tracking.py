"""Forward-mode differentiation of a running training: how its state changes with removals, without a record."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lightning_dtda.errors import RecordingError, ReplayError
from lightning_dtda.optimizers import UPDATES, GroupedUpdate, Hyperparameters, State, clipping
from lightning_dtda.recording import checks
from lightning_dtda.recording.configuration import hyperparameter_values, hyperparameters
from lightning_dtda.recording.data import read_batch
from lightning_dtda.recording.step_watch import StepWatch, TakenStep
from lightning_dtda.replay import Eager, Point, StepBatch, Tangents
from lightning_dtda.replay.batches import map_tensors
from lightning_dtda.replay.drift import RecordComparison, Recorded
from lightning_dtda.replay.replica import buffers
from lightning_dtda.replay.stand_ins import Time
from lightning_dtda.replay.steps import MicroBatchInputs
from lightning_dtda.replay.tangents import gradient_tangents, push
from lightning_dtda.trajectory import MicroBatch

_REASONS = (
    "The module changes while it trains, or training_step depends on something other than its parameters, its buffers "
    "and the batch."
)


class ResponseTracking:
    """Differentiates each step of a running training right after it is taken, and then discards it.

    Args:
        trainer: The Trainer.
        module: The module, before its first step.
        eager: Runner of a replica of the module, with the trained parameters.
        optimizer: Optimizer of the module.
        loader: The training DataLoader.
        membership: 1 for each example in a group ``(groups, N)``, else 0.
        tolerance: Tolerance as for :class:`~lightning_dtda.replay.Replay`.
        steps: Number of steps taken before.
        tangents: Tangents after these steps; zero if not given.
    """

    def __init__(
        self,
        *,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        eager: Eager,
        optimizer: Optimizer,
        loader: DataLoader[Any],
        membership: Tensor,
        tolerance: float,
        steps: int = 0,
        tangents: Tangents | None = None,
    ) -> None:
        self.layout = layout = eager.replica.layout
        self.eager = eager
        self._module = module
        self._make = partial(read_batch, loader)
        self.collate_fn = loader.collate_fn
        self.time = Time()
        self._membership = membership
        algorithm = trainer.gradient_clip_algorithm
        self._clipping = clipping(trainer.gradient_clip_val, algorithm and str(algorithm.value))
        parameters = layout.group_parameters(module.get_parameter(layout.names[0]).dtype)
        self._update = GroupedUpdate(UPDATES[checks.optimizer_path(optimizer)], layout.group_slices, parameters)
        self._names, self._options = hyperparameters(optimizer)
        self.watch = StepWatch(
            module=module,
            optimizer=optimizer,
            layout=layout,
            hyperparameter_names=self._names,
            applying=self._note_gradient,
            taken=self._after_step,
            steps=steps,
        )
        self.theta = self._parameters()
        self._states = self._current_states() if steps else None
        self._before = self._buffers()
        if tangents is None:
            values = hyperparameter_values(optimizer, self._names)
            states = self._update.initial_states(self.theta, self._of_groups(values))
            statistics = {name: self._before[name] for name in eager.statistics.names}
            tangents = Tangents.zeros(self.theta, states, statistics, len(membership))
        self.tangents = tangents
        dtype, device = self.theta.dtype, self.theta.device
        self._comparison = RecordComparison(
            ["The training"], trainer.precision, dtype, dtype, tolerance, dtype, device, _REASONS
        )
        self._batches: list[Any] = []
        self._current: Any = None
        self._last_buffers: dict[str, Tensor] | None = None

    def begin_micro_batch(self, batch: MicroBatch, accumulate_grad_batches: int, collated: Any) -> None:
        """Note the micro-batch that is about to be passed through the module."""
        if self.watch.is_between_steps:
            self._before = self._buffers()
            self._batches = []
        # a copy: the training may change the batch in place
        self._current = map_tensors(torch.clone, collated)
        self.watch.begin_micro_batch(batch, accumulate_grad_batches)

    def add_micro_batch(self) -> None:
        """Add the current micro-batch to the step; its loss is about to be differentiated."""
        self._batches.append(self._current)
        self.watch.add_micro_batch()

    def drop_pending(self) -> None:
        """Forget the micro-batches whose gradients are being discarded."""
        self._batches = []
        self.watch.drop_pending()

    def current_buffers(self) -> dict[str, Tensor]:
        """Return buffers and frozen parameters after the last step, each ``(1, ...)``."""
        return self._last_buffers if self._last_buffers is not None else self._buffers()

    def close(self) -> None:
        """Stop watching, and keep the current model, because the user may continue to train the module."""
        self.watch.close()
        self._last_buffers = self._buffers()

    def _note_gradient(self, gradients: list[Tensor]) -> None:
        self._applied = self.layout.flatten(gradients)[None]

    def _after_step(self, step: TakenStep) -> None:
        number = self.watch.steps - 1
        of_groups = self._of_groups(step.hyperparameters)
        if self._states is None:
            self._states = self._update.initial_states(self.theta, of_groups)
        try:
            self._push(number, step, of_groups, self._states)
        except ReplayError as error:
            raise RecordingError(str(error)) from error

    def _of_groups(self, hyperparameters: list[list[float]]) -> list[Hyperparameters]:
        return [
            dict(zip(self._names, values, strict=True)) | options
            for values, options in zip(hyperparameters, self._options, strict=True)
        ]

    def _push(self, number: int, step: TakenStep, of_groups: list[Hyperparameters], states: list[State]) -> None:
        applied = self._applied
        batch = self._batch(number, step.micro_batches, step.accumulate_grad_batches, of_groups)
        removed = self._membership[:, batch.indices].transpose(0, 1)
        buffers = {name: buffer.clone() for name, buffer in self._before.items()}
        found = gradient_tangents(self.eager, batch, self.theta, buffers, removed, self.tangents, updates=False)
        self._comparison.gradient(number, self._clipping.apply(found.gradient), applied)
        point = Point(self.theta, states, applied, found.gradient)
        self.tangents = push(self._update, self._clipping, of_groups, number, point, self.tangents, found)
        expected, _ = self._update.step(self.theta, states, applied, of_groups, step=number)
        before, self.theta, self._states = self.theta, self._parameters(), self._current_states()
        self._comparison.parameters(Recorded(number, number + 1, before, self.theta), expected)

    def _batch(
        self, number: int, micro_batches: list[MicroBatch], accumulated: int, of_groups: list[Hyperparameters]
    ) -> StepBatch:
        """Return the step as in a replay of one run."""
        self.time = Time(micro_batches[-1].epoch, number + 1, 0, of_groups)
        passes = [
            MicroBatchInputs(
                len(part.indices),
                Time(part.epoch, part.global_step, part.batch_idx, of_groups),
                part.rng_states,
                partial(rows_of_batch, collated, part.indices, self._make),
                1 / accumulated,
            )
            for part, collated in zip(micro_batches, self._batches, strict=True)
        ]
        return StepBatch.of([torch.cat([part.indices for part in micro_batches])], [passes], self.theta.device)

    def _current_states(self) -> list[State]:
        return [{key: part[None] for key, part in state.items()} for state in self.watch.states()]

    def _parameters(self) -> Tensor:
        return self.layout.flatten(self.watch.parameters)[None]

    def _buffers(self) -> dict[str, Tensor]:
        # copies: running statistics are changed in place
        found = buffers(self._module, self.layout, step=0)
        return {name: buffer.detach().clone()[None] for name, buffer in found.items()}


def rows_of_batch(collated: Any, indices: Tensor, make: Callable[[list[int]], Any], rows: Sequence[int]) -> Any:
    """Return the original micro-batch, or a batch of some of its examples, read again from the data set."""
    return collated if isinstance(rows, range) else make(indices[list(rows)].tolist())
