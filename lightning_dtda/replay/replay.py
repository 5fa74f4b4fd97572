"""Recorded runs as a differentiable function: theta_t forwards and backwards, and the products that adjoints need."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_dtda.errors import ReplayError
from lightning_dtda.optimizers import Hyperparameters, State
from lightning_dtda.optimizers.clipping import NormClipping
from lightning_dtda.replay.drift import Drift, RecordComparison, Recorded
from lightning_dtda.replay.eager import Eager, Products
from lightning_dtda.replay.examples import Examples
from lightning_dtda.replay.pieces import Start, visit_backwards
from lightning_dtda.replay.recorded_batches import RecordedBatches
from lightning_dtda.replay.records import Records, check_fit
from lightning_dtda.replay.replica import Replica
from lightning_dtda.replay.running_statistics import affect_passes
from lightning_dtda.replay.stand_ins import Circumstances, Time
from lightning_dtda.replay.steps import Point, StepBatch
from lightning_dtda.replay.tangents import Position, gradient_tangents, push
from lightning_dtda.replay.ways import Ways
from lightning_dtda.trajectory import Run

Precision = Literal["recorded", "float64"]


class Replay:
    """Replays several runs of equal shape, stacked, from their records.

    Args:
        runs: R runs with the same number of steps and the same checkpoints.
        module: The user's module; not modified.
        examples: Training examples.
        precision: ``"recorded"``, or ``"float64"`` to compute in double precision. In that case, each stretch starts
            from its recorded checkpoint and recomputes its gradients.
        device: Device to compute on; ``None`` for the module's device.
        tolerance: Largest difference that counts as rounding: at the end of a stretch relative to the distance
            travelled in it, and for a recomputed gradient relative to its norm. A changed example or unrecorded
            randomness causes differences orders of magnitude larger, float32 rounding causes ones 10 to 100 times
            smaller. The rounding of mixed precision is added to the tolerance.

    Raises:
        ReplayError: If the runs cannot be stacked, if the module or the data do not match the runs, or if the device
            does not support the precision.
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
        first = runs[0]
        self.layout = first.layout
        self.recorded_dtype = first.manifest.torch_dtype
        self.dtype = self.recorded_dtype if precision == "recorded" else torch.float64
        self.device = torch.device(module.device if device is None else device)
        if self.dtype == torch.float64 and self.device.type == "mps":
            raise ReplayError(
                'The device "mps" does not support double precision. Give device="cpu", or leave out '
                'precision="float64".'
            )
        self.examples = examples
        self.held = math.inf
        """Maximum number of steps to hold in memory at once; a longer range of steps is rebuilt piece by piece."""
        self._tolerance = tolerance
        circumstances = Circumstances.of(first.manifest)
        self._updated_buffers = circumstances.updated_buffers
        replica = Replica(
            module, self.layout, circumstances, self.dtype, self.device, self.recorded_dtype, examples.datamodule
        )
        self.eager = Eager(replica)
        self.ways = Ways(self.eager)
        self._can_stack: bool | None = None
        self._pass_depends_on_buffers = affect_passes(
            circumstances.updated_buffers, replica.module, self.eager.statistics
        )
        self._take(runs)

    def _take(self, runs: Sequence[Run]) -> None:
        self.runs = tuple(runs)
        first = self.runs[0]
        check_fit(self.runs, self.examples)
        self.steps = first.steps
        self.update = first.update
        self.clipping = first.clipping
        self.checkpoint_steps = first.checkpoint_steps
        self.records = Records(self.runs, self.dtype, self.device)
        self._batches = RecordedBatches(self.runs, self.examples, self.device)
        self._comparison = RecordComparison.of_runs(self.runs, self._tolerance, self.dtype, self.device)
        self.rebuilds_from_gradients = (
            first.has_exact_gradients and self.dtype == self.recorded_dtype and not self._pass_depends_on_buffers
        )
        """Whether steps are rebuilt from the recorded gradients, without running the module."""
        self._records_gradients = first.manifest.gradients != "none"

    def of(self, runs: Sequence[Run]) -> Replay:
        """Return a replay of other runs of the same ensemble that shares the module with this one."""
        other = copy.copy(self)
        other._take(runs)
        return other

    def alone(self, number: int) -> Replay:
        """Return a replay of a single run that shares the module with this one."""
        return self.of([self.runs[number]])

    @property
    def drift(self) -> tuple[Drift, ...]:
        """Largest deviation of each run's replay from its record so far."""
        return self._comparison.drift

    @property
    def stretches(self) -> list[tuple[int, int]]:
        """Ranges of steps between checkpoints, as (first, last) with ``last`` excluded."""
        return list(pairwise(self.checkpoint_steps))

    def time(self, step: int) -> Time:
        """Return the time of the first run after a number of steps."""
        last = max(step - 1, 0)
        run = self.runs[0]
        micro_batch = run.micro_batches(last)[-1]
        return Time(micro_batch.epoch, micro_batch.global_step + (step > last), 0, run.hyperparameters(last))

    # -- how steps are run

    def stack(self, stacked: bool = True) -> Replay:
        """Return a copy of this replay that runs all runs and directions of a step at once, or one by one.

        Steps that cannot be stacked always run one by one.
        """
        return self._in(self.ways.stack(stacked))

    def compile(self, compiled: bool = True) -> Replay:
        """Return a copy of this replay that compiles the products of steps, for one run and direction or stacked.

        The first step then takes 15 seconds or more. Steps that cannot be compiled run uncompiled, and so do those of
        recurrent layers, whose operations grow with the number of time steps.
        """
        return self._in(self.ways.compile(compiled))

    def _in(self, ways: Ways) -> Replay:
        other = copy.copy(self)
        other.ways = ways
        return other

    @property
    def can_stack(self) -> bool:
        """Whether the first step can be stacked."""
        if self._can_stack is None:
            directions = torch.zeros(1, 1, self.layout.size, dtype=self.dtype, device=self.device)
            first = self.alone(0).stack()
            first.directional(0, first.point(0), directions, first.buffers(0), first.no_statistics(directions))
            self._can_stack = self.ways.stacked.has_traced
        return self._can_stack

    def no_statistics(self, cotangents: Tensor) -> dict[str, Tensor]:
        """Return zero cotangents of the running statistics to match those of the parameters ``(runs, queries, P)``."""
        statistics = self.statistics(self.buffers(0))
        return {
            name: part.new_zeros(len(part), cotangents.shape[1], *part.shape[1:]) for name, part in statistics.items()
        }

    # -- recorded states and batches

    def trained(self, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the parameters ``(runs, P)`` and buffers, each ``(runs, ...)``, after ``step`` steps.

        Both are rebuilt from the previous checkpoint. After the last step, they are the final result of the training,
        which may be an average over its steps.
        """
        if step == self.steps and (average := self.records.average()) is not None:
            return average[0], self._with_statistics(average[1])
        theta, _, buffers = self._at(step, follows_buffers=bool(self._updated_buffers))
        return theta, buffers

    def point(self, step: int) -> Point:
        """Return the starting point of a step, rebuilt from the previous checkpoint."""
        return self.point_at(step, *self._at(step))[0]

    def _at(self, step: int, follows_buffers: bool = False) -> tuple[Tensor, list[State], dict[str, Tensor]]:
        """Return parameters, states and buffers after a number of steps, rebuilt from the previous checkpoint."""
        start = max(t for t in self.checkpoint_steps if t <= step)
        theta, states = self.checkpoint(start)
        buffers = self.buffers(start)
        for t in range(start, step):
            point, buffers = self.point_at(t, theta, states, buffers, follows_buffers)
            theta, states = self.advance(t, point)
        return theta, states, buffers

    def checkpoint(self, step: int) -> tuple[Tensor, list[State]]:
        """Read parameters ``(runs, P)`` and each group's optimizer state at a recorded checkpoint."""
        return self.records.checkpoint(step)

    def buffers(self, step: int) -> dict[str, Tensor]:
        """Read buffers and frozen parameters at a recorded checkpoint, each ``(runs, ...)``."""
        return self._with_statistics(self.records.buffers(step))

    def _with_statistics(self, buffers: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return recorded buffers, after comparing running statistics with those of the module."""
        for name in self.eager.statistics.names:
            found, wanted = buffers.get(name), self.eager.replica.module.get_buffer(name).shape
            if found is None or found.shape[1:] != wanted or not found.is_floating_point():
                raise ReplayError(
                    f"The recorded buffer {name} is missing, holds no real numbers, or has another shape than "
                    f"that of the module, {tuple(wanted)}. Give the module that was trained, or record the runs again."
                )
        return buffers

    def hyperparameters(self, step: int, ndim: int = 2) -> list[Hyperparameters]:
        """Return each group's hyperparameters; see :meth:`~lightning_dtda.replay.records.Records.hyperparameters`."""
        return self.records.hyperparameters(step, ndim)

    def batch(self, step: int) -> StepBatch:
        """Return the micro-batches of a step; their batches are made on demand."""
        return self._batches.of(step)

    def expect(self, steps: Sequence[int]) -> None:
        """Have DataLoader workers, if the training used them, read the batches of these steps ahead, in this order."""
        self._batches.expect(steps)

    # -- gradients

    def gradient(self, step: int, theta: Tensor, buffers: dict[str, Tensor], weights: Tensor | None = None) -> Tensor:
        r"""Recompute the gradient of the step's loss, :math:`g_t(\theta, w)` ``(runs, P)``.

        Args:
            step: Step t.
            theta: Parameters ``(runs, P)``.
            buffers: Buffers as returned by :meth:`buffers`.
            weights: Example weights w ``(runs, B)``; ones if not given.
        """
        return self._gradient(step, theta, buffers, weights)[0]

    def _gradient(
        self, step: int, theta: Tensor, buffers: dict[str, Tensor], weights: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return self.ways.chosen.gradient(self.batch(step), theta, buffers, weights)

    def check_step(self, step: int) -> None:
        """Compare the stretch of a step with the record, for callers that use its checkpoints and replay no steps.

        The stretch goes from the checkpoint at or before ``step`` to the next one, which must be reached again: from
        the recorded gradients if they have the precision of the parameters, else from recomputed ones. Recorded
        gradients are compared with a recomputed one at the first step.

        Raises:
            ReplayError: If the gradient or the checkpoint is not the recorded one. The message names run and step.
        """
        if not self.stretches:  # the training ended before a second checkpoint
            return
        start, end = next(stretch for stretch in reversed(self.stretches) if stretch[0] <= step)
        first, states = self.checkpoint(start)
        theta, buffers = first, self.buffers(start)
        if self._records_gradients:
            gradient = self.gradient(start, theta, buffers)
            self._comparison.gradient(start, self.clipping.apply(gradient), self.records.gradient(start))
        has_exact_gradients = all(run.has_exact_gradients for run in self.runs)
        if not has_exact_gradients:
            self.expect(range(start, end))
        for t in range(start, end):
            if has_exact_gradients:
                point = self._recorded_point(t, theta, states)
            else:
                point, buffers = self.point_at(t, theta, states, buffers)
            theta, states = self.advance(t, point)
        self.compare(start, end, first, theta)

    def retrain(
        self, weights: Tensor, start: int = 0, stop: int | None = None, *, averaged: bool = True
    ) -> tuple[Tensor, dict[str, Tensor]]:
        r"""Retrain the runs from a checkpoint with example weights, using the recorded batch order.

        .. math:: g_t(\theta, w) = \sum_z J_z^\top \left(w \odot \frac{\partial L_t}{\partial z}\right)

        Args:
            weights: Example weights w ``(runs, N)``; ones give the recorded training, up to rounding.
            start: Step of the checkpoint to start from.
            stop: Step to stop before; the end of training if not given.
            averaged: Whether to return the average over steps, if the training ended with one and all of its steps are
                retrained.

        Returns:
            The trained parameters ``(runs, P)`` and buffers, each ``(runs, ...)``.
        """
        stop = self.steps if stop is None else stop
        theta, states = self.checkpoint(start)
        buffers = self.buffers(start)
        coefficients = self.records.averaged_steps if averaged and start == 0 and stop == self.steps else {}
        total = torch.zeros_like(theta)
        of_statistics = {name: 0 * part for name, part in self.statistics(buffers).items()}
        self.expect(range(start, stop))
        for step in range(start, stop + 1):
            total += coefficients.get(step, 0.0) * theta
            for name, part in of_statistics.items():
                part += self.records.averages_statistics(step) * buffers[name]
            if step == stop:
                break
            of_examples = weights.gather(1, self._indices(step))
            gradient, after = self._gradient(step, theta, buffers, of_examples)
            buffers = buffers | after
            theta, states = self.advance(step, Point(theta, states, self.clipping.apply(gradient), gradient))
        if not coefficients:
            return theta, buffers
        return total, buffers | of_statistics

    def _indices(self, step: int) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence([run.batch_indices(step) for run in self.runs], batch_first=True).to(
            self.device
        )

    def statistics(self, buffers: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the running statistics among the buffers, each ``(runs, ...)``; their updates are differentiable."""
        return {name: buffers[name] for name in self.eager.statistics.names}

    # -- stretches

    def backwards(self, first: int, last: int, stop: int | None = None) -> Iterator[tuple[int, Point]]:
        """Yield the steps after a checkpoint with their starting points, from the last to the first.

        At most :attr:`held` steps are held in memory; a longer range of steps is rebuilt piece by piece.

        Args:
            first: Step of the checkpoint.
            last: Step after the last, at most that of the next checkpoint. If it is a checkpoint, the replay is
                compared with it.
            stop: First step not to yield; ``last`` if not given. Later steps are still replayed if the end is compared
                with a checkpoint.

        Raises:
            ReplayError: If the end of the stretch differs from the recorded checkpoint by more than rounding.
        """
        start = Start(*self.checkpoint(first), self.buffers(first))
        yield from visit_backwards(self, first, last, stop or last, start, compares=last in self.checkpoint_steps)

    def compare(self, first: int, last: int, start: Tensor, theta: Tensor) -> None:
        """Compare the end of a replayed stretch with the record.

        Args:
            first: First step of the stretch.
            last: Step after the last, that of a checkpoint.
            start: Parameters at the start ``(runs, P)``.
            theta: Rebuilt parameters at the end ``(runs, P)``.

        Raises:
            ReplayError: If the end differs from the recorded checkpoint by more than rounding.
        """
        recorded, states = self.checkpoint(last)
        preconditioner = self.update.preconditioner(states, self.hyperparameters(last - 1), step=last - 1)
        self._comparison.parameters(Recorded(first, last, start, recorded, preconditioner), theta)

    def adjoint(
        self, step: int, point: Point, theta_cotangent: Tensor, state_cotangents: Sequence[State]
    ) -> tuple[Tensor, list[State], Tensor]:
        r"""Pull cotangents back through the clipping and the optimizer update of a step.

        Args:
            step: Step t.
            point: Starting point of the step, from :meth:`backwards`.
            theta_cotangent: Cotangents of the parameters after the step ``(runs, queries, P)``.
            state_cotangents: Cotangents of each group's optimizer state after the step.

        Returns:
            The cotangents of the parameters (their direct effect on the update only), of the states, and of the
            gradient of the step's loss; the last are the directions for :meth:`directional`.
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
    ) -> tuple[Tensor, Products]:
        """Differentiate a step's gradient along directions, and compare the gradient with the record.

        Args:
            step: Step t.
            point: Starting point of the step, from :meth:`backwards`.
            directions: Directions v ``(runs, queries, P)``.
            buffers: Buffers as returned by :meth:`buffers`.
            statistics_cotangents: Cotangents of the running statistics after the step, each ``(runs, queries, ...)``.

        Returns:
            The data set indices of the step's examples ``(runs, B)``, and the products.

        Raises:
            ReplayError: If the gradient is not the recorded one. The message names run and step.
        """
        batch = self.batch(step)
        buffers = buffers | point.buffers
        products = self.ways.chosen.products(batch, point.theta, buffers, directions, statistics_cotangents)
        expected = [point.gradient]
        if self._records_gradients and not self.rebuilds_from_gradients:
            expected.append(self.records.gradient(step))
        self._compare_gradient(step, products.gradient, expected, point.theta, buffers)
        return batch.indices, products

    def _compare_gradient(
        self, step: int, computed: Tensor, expected: list[Tensor], theta: Tensor, buffers: dict[str, Tensor]
    ) -> None:
        def again() -> Tensor:
            return self.clipping.apply(self.eager.gradient(self.batch(step), theta, buffers)[0])

        for gradient in expected:
            self._comparison.gradient(step, self.clipping.apply(computed), gradient, again)

    def push(self, position: Position, membership: Tensor) -> Position:
        r"""Take a step forwards together with the tangents of removals.

        Let :math:`r_k` be the tangent of the parameters and :math:`S_k` the examples of removal k. The tangent of the
        step's gradient is

        .. math:: \dot g_k = H_t r_k - \sum_{n \in S_k \cap b_t} c_n \nabla l_n(\theta_t) .

        It is then pushed forwards through clipping and the optimizer's update.

        Args:
            position: Position before the step.
            membership: 1 where an example is in a removal, else 0 ``(removals, N)``.

        Returns:
            The position after the step.

        Raises:
            ReplayError: If the gradient is not the recorded one. The message names run and step.
        """
        step, theta, states, buffers = position.step, position.theta, position.states, position.buffers
        batch = self.batch(step)
        removed = membership[:, batch.indices].transpose(0, 1)
        tangents = gradient_tangents(
            self.ways.chosen, batch, theta, buffers, removed, position.tangents, bool(self._updated_buffers)
        )
        if self._records_gradients:
            self._compare_gradient(step, tangents.gradient, [self.records.gradient(step)], theta, buffers)
        point = (
            self._recorded_point(step, theta, states)
            if self.rebuilds_from_gradients
            else Point(theta, states, self.clipping.apply(tangents.gradient), tangents.gradient)
        )
        after = push(
            self.update, self.clipping, self.hyperparameters(step, ndim=3), step, point, position.tangents, tangents
        )
        return Position(step + 1, *self.advance(step, point), buffers | tangents.buffers, after)

    def point_at(
        self,
        step: int,
        theta: Tensor,
        states: list[State],
        buffers: dict[str, Tensor],
        follows_buffers: bool = False,
    ) -> tuple[Point, dict[str, Tensor]]:
        """Return the starting point of a step, and the buffers after it if they are needed or asked for."""
        if self.rebuilds_from_gradients and not follows_buffers:
            return self._recorded_point(step, theta, states), buffers
        unclipped, after = self._gradient(step, theta, buffers)
        if self.rebuilds_from_gradients:
            return self._recorded_point(step, theta, states), buffers | after
        held = {name: buffers[name] for name in after} if self._pass_depends_on_buffers else {}
        return Point(theta, states, self.clipping.apply(unclipped), unclipped, held), buffers | after

    def _recorded_point(self, step: int, theta: Tensor, states: list[State]) -> Point:
        applied = self.records.gradient(step)
        if isinstance(self.clipping, NormClipping):
            norms = self.records.gradient_norms(step)
            return Point(theta, states, applied, self.clipping.unclipped(applied, norms[:, None]))
        return Point(theta, states, applied, applied)

    @property
    def reads_gradients_again(self) -> bool:
        """Whether the gradients of held steps are read again when needed, instead of being held in memory."""
        return self.rebuilds_from_gradients and not self.ways.is_stacked

    def held_point(self, step: int, point: Point) -> Callable[[], Point]:
        """Return a function that recreates a point and holds as little memory as possible."""
        if self.reads_gradients_again:
            return partial(self._recorded_point, step, point.theta, point.states)
        return lambda: point

    def advance(self, step: int, point: Point) -> tuple[Tensor, list[State]]:
        """Return the parameters and states after a step."""
        return self.update.step(point.theta, point.states, point.gradient, self.hyperparameters(step), step=step)
