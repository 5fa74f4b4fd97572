"""One training under way, and how its state changes with removals: forward mode without a record."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_dtda.errors import RecordingError, ReplayError
from lightning_dtda.optimizers import UPDATES, Clipping, GroupedUpdate, Hyperparameters, State
from lightning_dtda.recording import checks
from lightning_dtda.recording.configuration import hyperparameters
from lightning_dtda.recording.run_recording import buffers
from lightning_dtda.recording.step_watch import StepWatch, TakenStep
from lightning_dtda.replay import Point, StepBatch, Tangents
from lightning_dtda.replay.batches import concatenate, map_tensors
from lightning_dtda.replay.drift import Comparison
from lightning_dtda.replay.functional import FunctionalModule
from lightning_dtda.replay.steps import draw_masks, parts_of
from lightning_dtda.replay.tangents import gradient_tangents, push
from lightning_dtda.trajectory import MicroBatch, ParameterLayout

REASONS = (
    "The module changes while it trains, or training_step depends on something other than its parameters, its buffers "
    "and the batch."
)


class ResponseTracking:
    """One training under way: its steps differentiated right after they are taken, and nothing kept of them.

    Args:
        module: The module, before its first step.
        functions: The same as functions, which know its dropout.
        optimizer: Its optimizer.
        layout: The trained parameters.
        clipping: The Trainer's.
        precision: The Trainer's.
        membership: 1 where an example is in a group ``(groups, N)``.
        tolerance: As for :class:`~lightning_dtda.replay.Replay`.
        steps: Number of steps taken before.
        tangents: After these; zero if not given.
    """

    def __init__(
        self,
        *,
        module: pl.LightningModule,
        functions: FunctionalModule,
        optimizer: Optimizer,
        layout: ParameterLayout,
        clipping: Clipping,
        precision: str,
        membership: Tensor,
        tolerance: float,
        steps: int = 0,
        tangents: Tangents | None = None,
    ) -> None:
        self.layout = layout
        self.functions = functions
        self._module = module
        self._membership = membership
        self._clipping = clipping
        self._update = GroupedUpdate(UPDATES[checks.optimizer_path(optimizer)], layout.group_slices)
        self._names, self._options = hyperparameters(optimizer)
        self.watch = StepWatch(
            module=module,
            optimizer=optimizer,
            layout=layout,
            hyperparameter_names=self._names,
            state_names=checks.state_names(optimizer),
            taken=self._after_step,
            steps=steps,
        )
        self.theta = self._parameters()
        self._states = self._current_states() if steps else None
        self._before = self._buffers()
        if tangents is None:
            state_names = checks.state_names(optimizer)
            states = [
                dict.fromkeys(names, self.theta[..., part])
                for part, names in zip(layout.group_slices, state_names, strict=True)
            ]
            statistics = {name: self._before[name] for name in functions.statistics}
            tangents = Tangents.zeros(self.theta, states, statistics, len(membership))
        self.tangents = tangents
        dtype, device = self.theta.dtype, self.theta.device
        self._comparison = Comparison(["The training"], precision, dtype, dtype, tolerance, dtype, device, REASONS)
        self._structure: Any = None
        self._last_buffers: dict[str, Tensor] | None = None

    def begin_micro_batch(
        self, indices: Tensor, epoch: int, batch: Any, batch_idx: int, accumulate_grad_batches: int
    ) -> None:
        """Note what is about to be passed through the module."""
        leaves, self._structure = tree_flatten(batch)
        if self.watch.is_between_steps:
            self._before = self._buffers()
        # a copy: the training may change the batch in place
        self.watch.begin_micro_batch(
            indices, epoch, batch_idx, tuple(leaf.clone() for leaf in leaves), accumulate_grad_batches
        )

    def current_buffers(self) -> dict[str, Tensor]:
        """Return buffers and frozen parameters as they are after the last step, each ``(1, ...)``."""
        return self._last_buffers if self._last_buffers is not None else self._buffers()

    def close(self) -> None:
        """Follow no more steps, and keep the model that they came to: the user may go on with it."""
        self.watch.close()
        self._last_buffers = self._buffers()

    def _after_step(self, step: TakenStep) -> None:
        number = self.watch.steps - 1
        of_groups: list[Hyperparameters] = [
            dict(zip(self._names, values, strict=True)) | options
            for values, options in zip(step.hyperparameters, self._options, strict=True)
        ]
        if self._states is None:
            self._states = self._update.initial_states(self.theta, of_groups)
        try:
            self._push(number, step, of_groups, self._states)
        except ReplayError as error:
            raise RecordingError(str(error)) from error

    def _push(self, number: int, step: TakenStep, of_groups: list[Hyperparameters], states: list[State]) -> None:
        applied = self.layout.flatten(step.gradients)[None]
        micro_batches = step.micro_batches
        self.functions.set_clock(micro_batches[0].epoch, number)
        batch = self._batch(number, micro_batches, step.accumulate_grad_batches)
        change = -batch.coefficients[:, None] * self._membership[:, batch.indices].transpose(0, 1)
        unclipped, _, of_gradient, of_statistics = gradient_tangents(
            self.functions, batch, self.theta, self._before, change, self.tangents
        )
        self._comparison.gradient(number, self._clipping.apply(unclipped), applied)
        point = Point(self.theta, states, applied, unclipped)
        self.tangents = push(
            self._update, self._clipping, of_groups, number, point, self.tangents, of_gradient, of_statistics
        )
        expected, _ = self._update.step(self.theta, states, applied, of_groups, step=number)
        before, self.theta, self._states = self.theta, self._parameters(), self._current_states()
        self._comparison.parameters(number, number + 1, before, expected, self.theta)

    def _batch(self, number: int, micro_batches: list[MicroBatch], accumulate_grad_batches: int) -> StepBatch:
        """Return the examples of a step, as a replay of one run has them."""
        device, dtype = self.theta.device, self.theta.dtype
        sizes = [len(part.indices) for part in micro_batches]
        divisors = [torch.full((n,), accumulate_grad_batches * n, dtype=torch.float64) for n in sizes]
        draws = any(part.rng_states for part in micro_batches)
        examples = concatenate([tree_unflatten(list(part.leaves), self._structure) for part in micro_batches])
        return StepBatch(
            torch.cat([part.indices for part in micro_batches])[None].to(device),
            (1 / torch.cat(divisors))[None].to(device, dtype),
            map_tensors(lambda leaf: leaf[None], examples),
            micro_batches[0].batch_idx,
            draw_masks(self.functions.dropout, number, ["this training"], [micro_batches], dtype) if draws else [],
            parts_of(number, [micro_batches], bool(self.functions.statistics)),
        )

    def _current_states(self) -> list[State]:
        return [{key: part[None] for key, part in state.items()} for state in self.watch.states()]

    def _parameters(self) -> Tensor:
        return self.layout.flatten(self.watch.parameters)[None]

    def _buffers(self) -> dict[str, Tensor]:
        # copies: running statistics are changed in place
        found = buffers(self._module, self.layout, step=0)
        return {name: buffer.detach().clone()[None] for name, buffer in found.items()}
