"""Recorded runs as a differentiable function: theta_t in either direction, and the products that adjoints need."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lightning_dtda.errors import ReplayError
from lightning_dtda.optimizers import Hyperparameters, State
from lightning_dtda.optimizers.clipping import NormClipping
from lightning_dtda.replay.batches import map_tensors
from lightning_dtda.replay.drift import Comparison, Drift
from lightning_dtda.replay.dropout import Mask
from lightning_dtda.replay.examples import Examples
from lightning_dtda.replay.functional import FunctionalModule
from lightning_dtda.replay.gradients import directional_derivatives, weighted_gradient
from lightning_dtda.replay.records import Records, check_fit
from lightning_dtda.replay.steps import Point, StepBatch, draw_masks, parts_of
from lightning_dtda.replay.tangents import Position, gradient_tangents, push
from lightning_dtda.trajectory import MicroBatch, Run

Precision = Literal["recorded", "float64"]


class Replay:
    """Runs of equal shape, stacked, and rebuilt from their records.

    Args:
        runs: R runs with the same number of steps and the same checkpoints.
        module: The user's module, unchanged.
        examples: The training examples.
        precision: ``"recorded"``, or ``"float64"`` to compute in double: each segment then starts from its recorded
            checkpoint and computes its gradients anew.
        device: Where to compute; ``None`` is the module's own device.
        tolerance: Largest difference at a segment's end that is taken for rounding, relative to the distance
            travelled in the segment; and of a recomputed gradient, relative to its norm. A changed example or
            unrecorded randomness is orders of magnitude above, float32 rounding one or two below. The rounding of
            mixed precision is allowed for on top: replays compute in the precision of the parameters.

    Raises:
        ReplayError: If the runs do not fit together, the module or the data do not fit the runs, or the device does
            not compute in the precision.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        module: LightningModule,
        examples: Examples,
        *,
        precision: Precision = "recorded",
        device: torch.device | str | None = None,
        tolerance: float = 1e-3,
    ) -> None:
        self.runs = tuple(runs)
        first = self.runs[0]
        check_fit(self.runs, examples)
        self.layout = first.layout
        self.steps = first.steps
        self.update = first.update
        self.clipping = first.clipping
        self.checkpoint_steps = first.checkpoint_steps
        self.recorded_dtype = first.manifest.torch_dtype
        self.dtype = self.recorded_dtype if precision == "recorded" else torch.float64
        self.device = torch.device(module.device if device is None else device)
        if self.dtype == torch.float64 and self.device.type == "mps":
            raise ReplayError(
                'The device "mps" does not compute in double. Give device="cpu", or the precision that was recorded.'
            )
        self._records = Records(self.runs, self.dtype, self.device)
        self.examples = examples.to((self.recorded_dtype, self.dtype), self.device)
        self.module = FunctionalModule(module, self.layout, first.manifest.evaluation_modules, self.dtype, self.device)
        self._tolerance = tolerance
        self._comparison = Comparison.of_runs(self.runs, tolerance, self.dtype, self.device)
        self._rebuild_from_gradients = first.has_exact_gradients and self.dtype == self.recorded_dtype
        self._records_gradients = first.manifest.gradients != "none"
        self._stores_batches = first.manifest.batches == "store"

    def alone(self, number: int) -> Replay:
        """Return the replay of one of the runs, which shares module and examples with this one."""
        one = copy.copy(self)
        one.runs = (self.runs[number],)
        one._records = Records(one.runs, self.dtype, self.device)
        one._comparison = Comparison.of_runs(one.runs, self._tolerance, self.dtype, self.device)
        return one

    @property
    def drift(self) -> tuple[Drift, ...]:
        """How far each run's replay was from its record so far."""
        return self._comparison.drift

    @property
    def segments(self) -> list[tuple[int, int]]:
        """The stretches between checkpoints, as (first step, last step) with the last not included."""
        return list(pairwise(self.checkpoint_steps))

    def theta(self, step: int) -> Tensor:
        """Return the parameters after ``step`` steps ``(runs, P)``, rebuilt from the checkpoint before."""
        if step in self.checkpoint_steps:
            return self.checkpoint(step)[0]
        point = self.point(step - 1)
        return self._advance(step - 1, point)[0]

    def trained(self, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return what there was after ``step`` steps: parameters ``(runs, P)``, and buffers, each ``(runs, ...)``.

        Both are rebuilt from the checkpoint before; of the buffers, only the running statistics change in between.
        """
        start = max(t for t in self.checkpoint_steps if t <= step)
        buffers = self.buffers(start)
        statistics = self.statistics(buffers)
        theta, states = self.checkpoint(start)
        for t in range(start, step):
            point = self._point(t, theta, states, buffers)
            if statistics:
                batch = self.batch(t)
                _, statistics = weighted_gradient(self.module, batch, theta, buffers | statistics, batch.coefficients)
            theta, states = self._advance(t, point)
        return theta, buffers | statistics

    def point(self, step: int) -> Point:
        """Return what a step started from, rebuilt from the checkpoint before."""
        start = max(t for t in self.checkpoint_steps if t <= step)
        theta, states = self.checkpoint(start)
        buffers = self.buffers(start)
        point = self._point(start, theta, states, buffers)
        for t in range(start, step):
            theta, states = self._advance(t, point)
            point = self._point(t + 1, theta, states, buffers)
        return point

    def checkpoint(self, step: int) -> tuple[Tensor, list[State]]:
        """Read parameters ``(runs, P)`` and each group's optimizer state at a recorded checkpoint."""
        return self._records.checkpoint(step)

    def buffers(self, step: int) -> dict[str, Tensor]:
        """Read buffers and frozen parameters at a recorded checkpoint, each ``(runs, ...)``."""
        return self._records.buffers(step)

    def hyperparameters(self, step: int, ndim: int = 2) -> list[Hyperparameters]:
        """Return each group's hyperparameters, as :meth:`~lightning_dtda.replay.records.Records.hyperparameters`."""
        return self._records.hyperparameters(step, ndim)

    def batch(self, step: int) -> StepBatch:
        """Return the examples of a step, with what each contributes to the loss.

        Raises:
            ReplayError: If the step drew random numbers that a replay of single examples cannot draw again.
        """
        micro_batches = [run.micro_batches(step) for run in self.runs]
        indices = pad_sequence([run.batch_indices(step) for run in self.runs], batch_first=True)
        coefficients = pad_sequence([run.coefficients(step) for run in self.runs], batch_first=True)
        clock = micro_batches[0][0]
        self.module.set_clock(clock.epoch, step)
        return StepBatch(
            indices.to(self.device),
            coefficients.to(self.device, self.dtype),
            self._examples(indices, micro_batches),
            clock.batch_idx,
            self._masks(step, micro_batches),
            parts_of(step, micro_batches, bool(self.module.statistics)),
        )

    def _examples(self, indices: Tensor, micro_batches: list[list[MicroBatch]]) -> Any:
        if not self._stores_batches:
            return self.examples.fetch(indices)
        of_runs = [[torch.cat(parts) for parts in zip(*(m.leaves for m in run), strict=True)] for run in micro_batches]
        return self.examples.restore(
            [pad_sequence(list(runs), batch_first=True) for runs in zip(*of_runs, strict=True)]
        )

    def _masks(self, step: int, micro_batches: list[list[MicroBatch]]) -> list[Mask]:
        """Draw the dropout masks of a step again, from the recorded states of the generators."""
        if not any(part.rng_states for parts in micro_batches for part in parts):
            return []
        if not self.module.dropout.calls:
            first = micro_batches[0][0]
            theta, buffers = self.runs[0].checkpoint(0).theta, self.buffers(0)
            self.module.learn_dropout(
                theta.to(self.device, self.dtype),
                {name: buffer[0] for name, buffer in buffers.items()},
                map_tensors(lambda leaf: leaf[0], self._examples(first.indices[None], [[first]])),
                first.batch_idx,
                self.recorded_dtype,
            )
        return draw_masks(self.module.dropout, step, [str(run.path) for run in self.runs], micro_batches, self.dtype)

    def gradient(self, step: int, theta: Tensor, buffers: dict[str, Tensor]) -> Tensor:
        r"""Compute the gradient of the step's loss anew.

        .. math:: g_t(\theta) = \sum_n c_n \nabla l_n(\theta)

        Args:
            step: t.
            theta: Parameters ``(runs, P)``.
            buffers: As :meth:`buffers` gives them.

        Returns:
            ``(runs, P)``.
        """
        batch = self.batch(step)
        return weighted_gradient(self.module, batch, theta, buffers, batch.coefficients)[0]

    def check_step(self, step: int) -> None:
        """Compare the gradient of one step with the record, for what replays no steps; nothing if none was recorded.

        The step compared is the first after the checkpoint at or before ``step``, whose parameters are on disk.

        Raises:
            ReplayError: If the gradient is not the recorded one, naming run and step.
        """
        if self._records_gradients:
            start = max(t for t in self.checkpoint_steps[:-1] if t <= step)
            gradient = self.gradient(start, self.checkpoint(start)[0], self.buffers(start))
            self._comparison.gradient(start, self.clipping.apply(gradient), self._records.gradient(start))

    def retrain(self, weights: Tensor, start: int = 0, stop: int | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        r"""Train the runs again from a checkpoint, in their own order, with example weights.

        .. math:: g_t(\theta, w) = \sum_n c_n w_n \nabla l_n(\theta)

        Args:
            weights: w ``(runs, N)``; ones give the recorded training, up to rounding.
            start: Step of a checkpoint.
            stop: Step of a later one, or the end.

        Returns:
            The trained parameters ``(runs, P)``, and buffers with the running statistics they were trained to, each
            ``(runs, ...)``.
        """
        stop = self.steps if stop is None else stop
        theta, states = self.checkpoint(start)
        statistics = self.statistics(self.buffers(start))
        for first, last in self.segments:
            if first < start or last > stop:
                continue
            buffers = self.buffers(first)
            for step in range(first, last):
                batch = self.batch(step)
                coefficients = batch.coefficients * weights.gather(1, batch.indices)
                gradient, statistics = weighted_gradient(self.module, batch, theta, buffers | statistics, coefficients)
                applied = self.clipping.apply(gradient)
                theta, states = self._advance(step, Point(theta, states, applied, gradient))
        return theta, self.buffers(stop) | statistics

    def statistics(self, buffers: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return those of the buffers that the training updates by differentiable steps, each ``(runs, ...)``."""
        return {name: buffers[name] for name in self.module.statistics}

    def segment(self, first: int, last: int) -> list[Point]:
        """Rebuild what each step from ``first`` to ``last - 1`` started from, and compare the end with the record.

        Raises:
            ReplayError: If the end differs from the recorded checkpoint by more than rounding.
        """
        theta, states = self.checkpoint(first)
        start = theta
        buffers = {} if self._rebuild_from_gradients else self.buffers(first)
        points = []
        for step in range(first, last):
            points.append(self._point(step, theta, states, buffers))
            theta, states = self._advance(step, points[-1])
        self.compare(first, last, start, theta)
        return points

    def compare(self, first: int, last: int, start: Tensor, theta: Tensor) -> None:
        """Compare what a replay came to at the end of a segment with the record.

        Args:
            first: The segment's first step.
            last: The step after its last.
            start: What it started from ``(runs, P)``.
            theta: What it came to ``(runs, P)``.

        Raises:
            ReplayError: If the end differs from the recorded checkpoint by more than rounding.
        """
        self._comparison.parameters(first, last, start, theta, self.checkpoint(last)[0])

    def adjoint(
        self, step: int, point: Point, theta_cotangent: Tensor, state_cotangents: Sequence[State]
    ) -> tuple[Tensor, list[State], Tensor]:
        r"""Pull cotangents back through clipping and update of a step.

        Args:
            step: t.
            point: Where the step started, from :meth:`segment`.
            theta_cotangent: Of the parameters after the step ``(runs, queries, P)``.
            state_cotangents: Of each group's optimizer state after the step.

        Returns:
            The cotangents of the parameters, as far as they act directly; of the states; and of the gradient of the
            step's loss, from which :meth:`directional` goes on.
        """
        theta, states, cotangent = self.update.adjoint(
            point.theta.unsqueeze(1),
            [{key: value.unsqueeze(1) for key, value in state.items()} for state in point.states],
            point.gradient.unsqueeze(1),
            self.hyperparameters(step, ndim=3),
            theta_cotangent,
            state_cotangents,
            step=step,
        )
        return theta, states, self.clipping.adjoint(point.unclipped.unsqueeze(1), cotangent)

    def directional(
        self,
        step: int,
        point: Point,
        directions: Tensor,
        buffers: dict[str, Tensor],
        statistics_cotangents: dict[str, Tensor],
    ) -> tuple[StepBatch, Tensor, Tensor, dict[str, Tensor]]:
        """Compute per-example slopes and the Hessian product, and compare the gradient with the record.

        As :func:`~lightning_dtda.replay.gradients.directional_derivatives`, which the gradient comes along with.

        Args:
            step: t.
            point: Where the step started, from :meth:`segment`.
            directions: v ``(runs, queries, P)``.
            buffers: As :meth:`buffers` gives them.
            statistics_cotangents: Of the running statistics after the step, each ``(runs, queries, ...)``.

        Returns:
            The step's batch, d ``(runs, queries, B)``, H v ``(runs, queries, P)``, and the cotangents of the running
            statistics before the step.

        Raises:
            ReplayError: If the gradient is not the recorded one, naming run and step.
        """
        batch = self.batch(step)
        slopes, products, of_statistics, gradient = directional_derivatives(
            self.module, batch, point.theta, buffers, directions, statistics_cotangents
        )
        applied = self.clipping.apply(gradient)
        self._comparison.gradient(step, applied, point.gradient)
        if self._records_gradients and not self._rebuild_from_gradients:
            self._comparison.gradient(step, applied, self._records.gradient(step))
        return batch, slopes, products, of_statistics

    def push(self, position: Position, membership: Tensor) -> Position:
        r"""Take a step forwards, the tangents of removals along with it.

        With :math:`r_k` the tangent of the parameters and :math:`S_k` the examples of removal k, that of the step's
        gradient is

        .. math:: \dot g_k = H_t r_k - \sum_{n \in S_k \cap b_t} c_n \nabla l_n(\theta_t),

        then clipping and the optimizer's update are differentiated forwards.

        Args:
            position: Before the step.
            membership: 1 where an example is in a removal ``(removals, N)``.

        Returns:
            After the step.

        Raises:
            ReplayError: If the gradient is not the recorded one, naming run and step.
        """
        step, theta, states, buffers = position.step, position.theta, position.states, position.buffers
        batch = self.batch(step)
        change = -batch.coefficients[:, None] * membership[:, batch.indices].transpose(0, 1)
        gradient, statistics, of_gradient, of_statistics = gradient_tangents(
            self.module, batch, theta, buffers, change, position.tangents
        )
        applied = self.clipping.apply(gradient)
        if self._records_gradients:
            self._comparison.gradient(step, applied, self._records.gradient(step))
        point = (
            self._point(step, theta, states, buffers)
            if self._rebuild_from_gradients
            else Point(theta, states, applied, gradient)
        )
        tangents = push(
            self.update,
            self.clipping,
            self.hyperparameters(step, ndim=3),
            step,
            point,
            position.tangents,
            of_gradient,
            of_statistics,
        )
        return Position(step + 1, *self._advance(step, point), buffers | statistics, tangents)

    def _point(self, step: int, theta: Tensor, states: list[State], buffers: dict[str, Tensor]) -> Point:
        if not self._rebuild_from_gradients:
            unclipped = self.gradient(step, theta, buffers)
            return Point(theta, states, self.clipping.apply(unclipped), unclipped)
        applied = self._records.gradient(step)
        if isinstance(self.clipping, NormClipping):
            norms = self._records.gradient_norms(step)
            return Point(theta, states, applied, self.clipping.unclipped(applied, norms[:, None]))
        return Point(theta, states, applied, applied)

    def _advance(self, step: int, point: Point) -> tuple[Tensor, list[State]]:
        return self.update.step(point.theta, point.states, point.gradient, self.hyperparameters(step), step=step)
