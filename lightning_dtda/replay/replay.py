"""Recorded runs as a differentiable function: theta_t in either direction, and the products that adjoints need."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_dtda.errors import ReplayError
from lightning_dtda.optimizers import Hyperparameters, State
from lightning_dtda.optimizers.clipping import NormClipping
from lightning_dtda.replay.batches import stack_leaves
from lightning_dtda.replay.compiled import CompiledAlone, CompiledStack
from lightning_dtda.replay.drift import Comparison, Drift, Recorded
from lightning_dtda.replay.eager import Eager, Products
from lightning_dtda.replay.examples import Examples
from lightning_dtda.replay.pieces import FEWEST_HELD, left_to_hold, piece_length
from lightning_dtda.replay.records import Records, check_fit
from lightning_dtda.replay.replica import Replica
from lightning_dtda.replay.running_statistics import batch_norm_layers
from lightning_dtda.replay.stacked import Stacked
from lightning_dtda.replay.stand_ins import Circumstances, Time
from lightning_dtda.replay.steps import MicroBatchInputs, Point, StepBatch
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
            mixed precision is allowed for on top.

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
        first = runs[0]
        self.layout = first.layout
        self.recorded_dtype = first.manifest.torch_dtype
        self.dtype = self.recorded_dtype if precision == "recorded" else torch.float64
        self.device = torch.device(module.device if device is None else device)
        if self.dtype == torch.float64 and self.device.type == "mps":
            raise ReplayError(
                'The device "mps" does not compute in double. Give device="cpu", or the precision that was recorded.'
            )
        self.examples = examples
        self.held = math.inf
        """How many steps may be held in memory at once; a longer stretch is rebuilt piece by piece."""
        self._tolerance = tolerance
        circumstances = Circumstances.of(first.manifest)
        self._updated_buffers = circumstances.updated_buffers
        replica = Replica(
            module, self.layout, circumstances, self.dtype, self.device, self.recorded_dtype, examples.datamodule
        )
        self.eager = Eager(replica)
        self._stacking = Stacked(self.eager)
        self._compiling = {True: CompiledStack(self.eager), False: CompiledAlone(self.eager)}
        self._is_stacked, self._is_compiled = False, False
        self._can_stack: bool | None = None
        statistics = set(self.eager.statistics.names)
        counters = {
            f"{name}.num_batches_tracked".lstrip(".")
            for name, layer in batch_norm_layers(replica.module).items()
            if layer.momentum is not None
        }
        # running statistics leave a pass in training mode as it is
        self._pass_depends_on_buffers = not statistics | counters >= set(circumstances.updated_buffers)
        self._take(runs)

    def _take(self, runs: Sequence[Run]) -> None:
        self.runs = tuple(runs)
        first = self.runs[0]
        check_fit(self.runs, self.examples)
        self.steps = first.steps
        self.update = first.update
        self.clipping = first.clipping
        self.checkpoint_steps = first.checkpoint_steps
        self._records = Records(self.runs, self.dtype, self.device)
        self._comparison = Comparison.of_runs(self.runs, self._tolerance, self.dtype, self.device)
        self.rebuilds_from_gradients = (
            first.has_exact_gradients and self.dtype == self.recorded_dtype and not self._pass_depends_on_buffers
        )
        """Whether steps are rebuilt from recorded gradients, without the module."""
        self._records_gradients = first.manifest.gradients != "none"
        self._stores_batches = first.manifest.batches == "store"
        self._ahead: Iterator[tuple[int, list[list[Any]]]] | None = None

    def of(self, runs: Sequence[Run]) -> Replay:
        """Return the replay of other runs of the same ensemble, which shares the module with this one."""
        other = copy.copy(self)
        other._take(runs)
        return other

    def alone(self, number: int) -> Replay:
        """Return the replay of one of the runs, which shares the module with this one."""
        return self.of([self.runs[number]])

    @property
    def drift(self) -> tuple[Drift, ...]:
        """How far each run's replay was from its record so far."""
        return self._comparison.drift

    @property
    def segments(self) -> list[tuple[int, int]]:
        """The stretches between checkpoints, as (first step, last step) with the last not included."""
        return list(pairwise(self.checkpoint_steps))

    def time(self, step: int) -> Time:
        """Return where the first run stood after a number of steps."""
        last = max(step - 1, 0)
        run = self.runs[0]
        micro_batch = run.micro_batches(last)[-1]
        return Time(micro_batch.epoch, micro_batch.global_step + (step > last), 0, run.hyperparameters(last))

    # -- ways of running a step

    def stack(self, stacked: bool = True) -> Replay:
        """Return this replay, with all runs and directions of a step run at once, or one by one.

        A step that cannot be stacked is run one by one all the same.
        """
        other = copy.copy(self)
        other._is_stacked = stacked
        return other

    def compile(self, compiled: bool = True) -> Replay:
        """Return this replay, with a step's products compiled, for one run and direction or stacked.

        The first step of all takes a quarter of a minute or more then. What cannot be compiled is run as it is.
        """
        other = copy.copy(self)
        other._is_compiled = compiled
        return other

    @property
    def has_compiled(self) -> bool:
        """Whether steps of this replay were compiled."""
        return self._compiling[self._is_stacked].has_compiled

    @property
    def can_stack(self) -> bool:
        """Whether the first step can be stacked."""
        if self._can_stack is None:
            directions = torch.zeros(1, 1, self.layout.size, dtype=self.dtype, device=self.device)
            first = self.alone(0).stack()
            first.directional(0, first.point(0), directions, first.buffers(0), first.no_statistics(directions))
            self._can_stack = self._stacking.has_traced
        return self._can_stack

    @property
    def _way(self) -> Eager:
        if self._is_compiled:
            return self._compiling[self._is_stacked]
        return self._stacking if self._is_stacked else self.eager

    def no_statistics(self, cotangents: Tensor) -> dict[str, Tensor]:
        """Return zero cotangents of the running statistics for cotangents of the parameters ``(runs, queries, P)``."""
        statistics = self.statistics(self.buffers(0))
        return {
            name: part.new_zeros(len(part), cotangents.shape[1], *part.shape[1:]) for name, part in statistics.items()
        }

    # -- what was recorded

    def trained(self, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return what there was after ``step`` steps: parameters ``(runs, P)``, and buffers, each ``(runs, ...)``.

        Both are rebuilt from the checkpoint before. After the last step they are what the training ended with, which
        may be an average over its steps.
        """
        if step == self.steps and (average := self._records.average()) is not None:
            return average
        theta, _, buffers = self._at(step, follows_buffers=bool(self._updated_buffers))
        return theta, buffers

    def point(self, step: int) -> Point:
        """Return what a step started from, rebuilt from the checkpoint before."""
        return self._point(step, *self._at(step))[0]

    def _at(self, step: int, follows_buffers: bool = False) -> tuple[Tensor, list[State], dict[str, Tensor]]:
        """Return parameters, states and buffers after a number of steps, rebuilt from the checkpoint before."""
        start = max(t for t in self.checkpoint_steps if t <= step)
        theta, states = self.checkpoint(start)
        buffers = self.buffers(start)
        for t in range(start, step):
            point, buffers = self._point(t, theta, states, buffers, follows_buffers)
            theta, states = self._advance(t, point)
        return theta, states, buffers

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
        """Return the micro-batches of a step, to be made again."""
        micro_batches = [run.micro_batches(step) for run in self.runs]
        ready = self._read_ahead(step)
        passes = [
            [
                self._inputs(run, step, micro_batch, ready[number][part] if ready else None)
                for part, micro_batch in enumerate(of_run)
            ]
            for number, (run, of_run) in enumerate(zip(self.runs, micro_batches, strict=True))
        ]
        indices = [run.batch_indices(step) for run in self.runs]
        return StepBatch.of(indices, passes, self.device, lambda part: self._leaves(micro_batches, passes, part))

    def expect(self, steps: Sequence[int]) -> None:
        """Have workers, where the training used them, read the batches of steps in this order."""
        if self._stores_batches or not self.examples.reads_ahead:
            self._ahead = None
            return
        lists = [
            [[micro_batch.indices.tolist() for micro_batch in run.micro_batches(step)] for run in self.runs]
            for step in steps
        ]
        batches = self.examples.batches([indices for step in lists for run in step for indices in run])
        self._ahead = (
            (step, [[next(batches) for _ in run] for run in of_step])
            for step, of_step in zip(steps, lists, strict=True)
        )

    def _read_ahead(self, step: int) -> list[list[Any]] | None:
        if self._ahead is None:
            return None
        expected, batches = next(self._ahead, (None, None))
        if expected != step:
            self._ahead = None
            return None
        return batches

    def _inputs(self, run: Run, step: int, micro_batch: MicroBatch, ready: Any) -> MicroBatchInputs:
        def make(rows: Sequence[int]) -> Any:
            if self._stores_batches:
                return self.examples.restore([leaf[list(rows)] for leaf in micro_batch.leaves])
            if ready is not None and isinstance(rows, range):
                return ready
            return self.examples.collated(micro_batch.indices[list(rows)].tolist())

        time = Time(micro_batch.epoch, micro_batch.global_step, micro_batch.batch_idx, run.hyperparameters(step))
        factor = 1 / (run.accumulation(step) * len(run.processes))
        return MicroBatchInputs(
            len(micro_batch.indices), time, micro_batch.rng_states, make, factor, micro_batch.process == 0
        )

    def _leaves(
        self, micro_batches: list[list[MicroBatch]], passes: list[list[MicroBatchInputs]], part: int
    ) -> list[Tensor] | None:
        """Return the tensors of micro-batch number ``part`` of all runs, ``None`` where they cannot be stacked."""
        if len({len(of_run) for of_run in passes}) > 1 or len({of_run[part].examples for of_run in passes}) > 1:
            return None
        if not self._stores_batches:
            found = self.examples.tensors(torch.stack([of_run[part].indices for of_run in micro_batches]))
            if found is not None:
                return found
        return stack_leaves([of_run[part].batch() for of_run in passes])

    # -- gradients

    def gradient(self, step: int, theta: Tensor, buffers: dict[str, Tensor], weights: Tensor | None = None) -> Tensor:
        r"""Compute the gradient of the step's loss anew, :math:`g_t(\theta, w)` ``(runs, P)``.

        Args:
            step: t.
            theta: Parameters ``(runs, P)``.
            buffers: As :meth:`buffers` gives them.
            weights: w ``(runs, B)``; ones if not given.
        """
        return self._gradient(step, theta, buffers, weights)[0]

    def _gradient(
        self, step: int, theta: Tensor, buffers: dict[str, Tensor], weights: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return self._way.gradient(self.batch(step), theta, buffers, weights)

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

    @property
    def averaged_steps(self) -> dict[int, float]:
        """The coefficients of the average that the runs ended with, by step; none where there is none."""
        return self.runs[0].averaged_steps

    def averages_statistics(self, step: int) -> float:
        """Return the coefficient of a step's running statistics in what the training ended with."""
        average = self.runs[0].manifest.average
        if average is None or average["buffers"] == "last":
            return float(step == self.steps)
        if average["buffers"] == "updated":  # those of the last update
            return float(step == average["steps"][-1])
        return self.averaged_steps.get(step, 0.0)

    def retrain(
        self, weights: Tensor, start: int = 0, stop: int | None = None, *, averaged: bool = True
    ) -> tuple[Tensor, dict[str, Tensor]]:
        r"""Train the runs again from a checkpoint, in their own order, with example weights.

        .. math:: g_t(\theta, w) = \sum_z J_z^\top \left(w \odot \frac{\partial L_t}{\partial z}\right)

        Args:
            weights: w ``(runs, N)``; ones give the recorded training, up to rounding.
            start: Step of a checkpoint.
            stop: Step of a later one, or the end.
            averaged: Whether to return the average, where the training ended with one and it is trained from start to
                end.

        Returns:
            The trained parameters ``(runs, P)``, and buffers as they were trained to, each ``(runs, ...)``.
        """
        stop = self.steps if stop is None else stop
        theta, states = self.checkpoint(start)
        buffers = self.buffers(start)
        coefficients = self.averaged_steps if averaged and start == 0 and stop == self.steps else {}
        total = torch.zeros_like(theta)
        of_statistics = {name: 0 * part for name, part in self.statistics(buffers).items()}
        self.expect(range(start, stop))
        for step in range(start, stop + 1):
            total += coefficients.get(step, 0.0) * theta
            for name, part in of_statistics.items():
                part += self.averages_statistics(step) * buffers[name]
            if step == stop:
                break
            of_examples = weights.gather(1, self._indices(step))
            gradient, after = self._gradient(step, theta, buffers, of_examples)
            buffers = buffers | after
            theta, states = self._advance(step, Point(theta, states, self.clipping.apply(gradient), gradient))
        if not coefficients:
            return theta, buffers
        return total, buffers | of_statistics

    def _indices(self, step: int) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence([run.batch_indices(step) for run in self.runs], batch_first=True).to(
            self.device
        )

    def statistics(self, buffers: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return those of the buffers that the training updates by differentiable steps, each ``(runs, ...)``."""
        return {name: buffers[name] for name in self.eager.statistics.names}

    # -- segments

    def backwards(self, first: int, last: int, stop: int | None = None) -> Iterator[tuple[int, Point]]:
        """Yield the steps from a checkpoint on, from the last to the first, with what each started from.

        No more than :attr:`held` of them are held at once; a longer stretch is rebuilt piece by piece.

        Args:
            first: The step of a checkpoint.
            last: The step after the last, up to the next checkpoint, with which the replay is compared.
            stop: Steps from it on are left out; they are replayed all the same, to be compared with the record.

        Raises:
            ReplayError: If the segment's end differs from the recorded checkpoint by more than rounding.
        """
        theta, states = self.checkpoint(first)
        compare = last in self.checkpoint_steps
        yield from self._backwards(first, last, stop or last, theta, states, self.buffers(first), compare)

    def _backwards(
        self,
        first: int,
        last: int,
        stop: int,
        theta: Tensor,
        states: list[State],
        buffers: dict[str, Tensor],
        compare: bool = False,
        held: float | None = None,
    ) -> Iterator[tuple[int, Point]]:
        held = max(FEWEST_HELD, self.held) if held is None else held
        piece = piece_length(stop - first, held)
        points, starts = self._rebuilt(first, last if compare else stop, stop, piece, theta, states, buffers, compare)
        if points:
            self.expect(range(stop - 1, first - 1, -1))
        while points:
            yield first + len(points) - 1, points.pop()()
        while starts:
            begin = first + piece * (len(starts) - 1)
            end = min(begin + piece, stop)
            # not by names here, which would hold what the pieces inside are done with
            yield from self._backwards(begin, end, end, *starts.pop(), held=left_to_hold(held, len(starts)))

    def _rebuilt(
        self,
        first: int,
        last: int,
        stop: int,
        piece: int,
        theta: Tensor,
        states: list[State],
        buffers: dict[str, Tensor],
        compare: bool,
    ) -> tuple[list[Callable[[], Point]], list[tuple[Tensor, list[State], dict[str, Tensor]]]]:
        """Return what the steps before ``stop`` start from, if they are one piece; else what each piece starts from."""
        points, starts, first_theta = [], [], theta
        if not self.rebuilds_from_gradients:
            self.expect(range(first, last))
        for step in range(first, last):
            if step < stop and piece < stop - first and (step - first) % piece == 0:
                starts.append((theta, states, buffers))
            point, buffers = self._point(step, theta, states, buffers)
            if step < stop and not starts:
                points.append(self._held_point(step, point))
            theta, states = self._advance(step, point)
        if compare:
            self.compare(first, last, first_theta, theta)
        return points, starts

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
        recorded, states = self.checkpoint(last)
        preconditioner = self.update.preconditioner(states, self.hyperparameters(last - 1), step=last - 1)
        self._comparison.parameters(Recorded(first, last, start, recorded, preconditioner), theta)

    def adjoint(
        self, step: int, point: Point, theta_cotangent: Tensor, state_cotangents: Sequence[State]
    ) -> tuple[Tensor, list[State], Tensor]:
        r"""Pull cotangents back through clipping and update of a step.

        Args:
            step: t.
            point: Where the step started, from :meth:`backwards`.
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
    ) -> tuple[Tensor, Products]:
        """Differentiate a step's gradient along directions, and compare the gradient with the record.

        Args:
            step: t.
            point: Where the step started, from :meth:`backwards`.
            directions: v ``(runs, queries, P)``.
            buffers: As :meth:`buffers` gives them.
            statistics_cotangents: Of the running statistics after the step, each ``(runs, queries, ...)``.

        Returns:
            The data set indices of the step's examples ``(runs, B)``, and the products.

        Raises:
            ReplayError: If the gradient is not the recorded one, naming run and step.
        """
        batch = self.batch(step)
        buffers = buffers | point.buffers
        products = self._way.products(batch, point.theta, buffers, directions, statistics_cotangents)
        expected = [point.gradient]
        if self._records_gradients and not self.rebuilds_from_gradients:
            expected.append(self._records.gradient(step))
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
        removed = membership[:, batch.indices].transpose(0, 1)
        tangents = gradient_tangents(
            self._way, batch, theta, buffers, removed, position.tangents, bool(self._updated_buffers)
        )
        if self._records_gradients:
            self._compare_gradient(step, tangents.gradient, [self._records.gradient(step)], theta, buffers)
        point = (
            self._recorded_point(step, theta, states)
            if self.rebuilds_from_gradients
            else Point(theta, states, self.clipping.apply(tangents.gradient), tangents.gradient)
        )
        after = push(
            self.update, self.clipping, self.hyperparameters(step, ndim=3), step, point, position.tangents, tangents
        )
        return Position(step + 1, *self._advance(step, point), buffers | tangents.buffers, after)

    def _point(
        self,
        step: int,
        theta: Tensor,
        states: list[State],
        buffers: dict[str, Tensor],
        follows_buffers: bool = False,
    ) -> tuple[Point, dict[str, Tensor]]:
        """Return what a step starts from, and the buffers after it: followed where they are needed, or asked for."""
        if self.rebuilds_from_gradients and not follows_buffers:
            return self._recorded_point(step, theta, states), buffers
        unclipped, after = self._gradient(step, theta, buffers)
        if self.rebuilds_from_gradients:
            return self._recorded_point(step, theta, states), buffers | after
        held = {name: buffers[name] for name in after} if self._pass_depends_on_buffers else {}
        return Point(theta, states, self.clipping.apply(unclipped), unclipped, held), buffers | after

    def _recorded_point(self, step: int, theta: Tensor, states: list[State]) -> Point:
        applied = self._records.gradient(step)
        if isinstance(self.clipping, NormClipping):
            norms = self._records.gradient_norms(step)
            return Point(theta, states, applied, self.clipping.unclipped(applied, norms[:, None]))
        return Point(theta, states, applied, applied)

    @property
    def reads_gradients_again(self) -> bool:
        """Whether gradients of steps that are held are read when they are needed, in place of being held."""
        return self.rebuilds_from_gradients and not self._is_stacked

    def _held_point(self, step: int, point: Point) -> Callable[[], Point]:
        """Return what makes a point again, which holds as little as it can."""
        if self.reads_gradients_again:
            return partial(self._recorded_point, step, point.theta, point.states)
        return lambda: point

    def _advance(self, step: int, point: Point) -> tuple[Tensor, list[State]]:
        return self.update.step(point.theta, point.states, point.gradient, self.hyperparameters(step), step=step)
