"""Many trainings of one module at once: parameters have an extra dimension, and each training has its own batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_dtda.errors import CannotStackError, ReplayError
from lightning_dtda.optimizers import Hyperparameters, State
from lightning_dtda.replay import Examples
from lightning_dtda.replay.batches import stack_leaves
from lightning_dtda.replay.drift import RecordComparison, Recorded
from lightning_dtda.replay.stand_ins import Time
from lightning_dtda.stacking.gradient import StackedGradient
from lightning_dtda.trajectory import Run

_CHUNK_BYTES = 64 * 2**20
"""Bytes of examples to fetch together, for one or more steps."""

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Largest deviation from the Trainer's parameters between two checkpoints, relative to the distance travelled; in
single precision the same as for replays. Rounding stays far below, unless it puts an input on the other side of a
kink."""

_NEARBY = 32
"""Minimum number of trainings started within rounding of the reference, of which one has to come out as recorded. At a
kink, each goes either way with about even odds, so one of 32 goes the right way at five kinks."""

_REASONS = "training_step depends on something that stacked trainings lack, or hooks or callbacks change the training."


@dataclass(frozen=True)
class Schedule:
    """Steps of a recorded training, which all trainings of a stack share.

    Args:
        sizes: Number of examples in each micro-batch of each step.
        clocks: ``(epoch, batch_idx)`` of each micro-batch.
        divisors: Divisor of each step's losses, for accumulated gradients.
        hyperparameters: Hyperparameters of each parameter group at each step.
    """

    sizes: list[tuple[int, ...]]
    clocks: list[tuple[tuple[int, int], ...]]
    divisors: list[int]
    hyperparameters: list[list[Hyperparameters]]

    @classmethod
    def of(cls, run: Run) -> Schedule:
        """Read the schedule from a recorded training."""
        sizes, clocks, divisors = [], [], []
        for step in range(run.steps):
            parts = run.micro_batches(step)
            sizes.append(tuple(len(part.indices) for part in parts))
            clocks.append(tuple((part.epoch, part.batch_idx) for part in parts))
            divisors.append(run.accumulation(step))
        return cls(sizes, clocks, divisors, [run.hyperparameters(step) for step in range(run.steps)])

    @property
    def times(self) -> list[Time]:
        """Times of the first two micro-batches, the middle one and the last."""
        flat = [self.time(step, part) for step, parts in enumerate(self.clocks) for part in range(len(parts))]
        numbers = {n for n in (0, 1, len(flat) // 2, len(flat) - 1) if n < len(flat)}
        return [flat[n] for n in sorted(numbers)]

    @property
    def end(self) -> Time:
        """Time after the last step."""
        return self.time(len(self.clocks) - 1, -1)._replace(step=len(self.clocks), batch_idx=0)

    def time(self, step: int, part: int) -> Time:
        """Return the time of a micro-batch of a step."""
        epoch, batch_idx = self.clocks[step][part]
        return Time(epoch, step, batch_idx, self.hyperparameters[step])


@dataclass(frozen=True)
class Start:
    """Initial state of a stack.

    Args:
        theta: Initial parameters ``(runs, P)``.
        buffers: Buffers and frozen parameters by name, each ``(runs, ...)``.
        orders: Data set indices of the examples in training order ``(runs, examples)``.
    """

    theta: Tensor
    buffers: dict[str, Tensor]
    orders: Tensor


@dataclass(frozen=True)
class Taken:
    """A step that a stack has just taken.

    Args:
        steps: Number of steps taken so far.
        theta: Parameters after the step ``(runs, P)``.
        states: Optimizer state of each parameter group after the step, each ``(runs, ...)``.
        gradient: Gradient as applied by the optimizer ``(runs, P)``.
        unclipped: Gradient before clipping ``(runs, P)``.
    """

    steps: int
    theta: Tensor
    states: list[State]
    gradient: Tensor
    unclipped: Tensor


class StackedTraining:
    """Trains stacks on one device.

    The first row of each stack is a training that the Trainer has also run and recorded. At each recorded checkpoint it
    is compared with the record and reset to it. Every stack is thus checked from its first step to its last, by the
    same operations that train it, and rounding does not accumulate.

    Args:
        examples: All training examples.
        reference: The recorded training.
        schedule: Schedule of its steps.
        gradient: Function that computes gradients.
        device: Device to train on.
    """

    def __init__(
        self, examples: Examples, reference: Run, schedule: Schedule, gradient: StackedGradient, device: torch.device
    ) -> None:
        self._examples = examples
        self._reference = reference
        self._schedule = schedule
        self._gradient = gradient
        self._device = device
        table = examples.tensors(slice(None))
        self._table = None if table is None else [leaf.to(device) for leaf in table]
        self._update, self._clipping = reference.update, reference.clipping

    def train(
        self, start: Start, taken: Callable[[Taken], None] = lambda step: None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Train a stack whose first row is the reference.

        Args:
            start: Initial state of the stack.
            taken: Function called after each step, and after the comparison if there is one.

        Returns:
            Trained parameters ``(runs, P)`` and buffers.

        Raises:
            CannotStackError: If the reference does not reproduce the Trainer's result.
        """
        theta, buffers = start.theta, start.buffers
        states = self._update.initial_states(theta, self._schedule.hyperparameters[0])
        comparison = self._comparison()
        begin, at_checkpoint = 0, theta[:1].clone()
        for end in self._reference.checkpoint_steps[1:]:
            for step in self._steps(begin, end, start.orders, theta, states, buffers):
                theta, states = step.theta, step.states
                if step.steps == end:
                    at_checkpoint = self._check(comparison, begin, at_checkpoint, step, start)
                taken(step)
            begin = end
        return theta, buffers

    def _steps(
        self, begin: int, end: int, orders: Tensor, theta: Tensor, states: list[State], buffers: dict[str, Tensor]
    ) -> Iterator[Taken]:
        """Take steps and yield them; the caller may change the tensors of a step in place before the next one."""
        for step, batches in enumerate(self.batches(orders, begin, end), begin):
            gradient = self.gradient(step, theta, buffers, batches)
            applied = self._clipping.apply(gradient)
            hyperparameters = self._schedule.hyperparameters[step]
            theta, states = self._update.step(theta, states, applied, hyperparameters, step=step)
            yield Taken(step + 1, theta, states, applied, gradient)

    def gradient(
        self, step: int, theta: Tensor, buffers: dict[str, Tensor], batches: Sequence[Sequence[Tensor]]
    ) -> Tensor:
        """Return the gradient of a step's loss ``(runs, P)``, from the tensors of its micro-batches."""
        times = [self._schedule.time(step, part) for part in range(len(batches))]
        gradients = [self._gradient(theta, buffers, leaves, time) for leaves, time in zip(batches, times, strict=True)]
        total = gradients[0] if len(gradients) == 1 else torch.stack(gradients).sum(0)
        divisor = self._schedule.divisors[step]
        return total if divisor == 1 else total / divisor

    def batches(self, orders: Tensor, begin: int, end: int) -> Iterator[list[list[Tensor]]]:
        """Yield the micro-batches of each step from ``begin`` to ``end`` as tensors, each ``(runs, B, ...)``."""
        bytes_of = sum(leaf[0].nbytes for leaf in self._table or ()) * len(orders)
        chunk: list[tuple[int, ...]] = []
        start = sum(map(sum, self._schedule.sizes[:begin]))
        for step, sizes in enumerate(self._schedule.sizes[begin:end], begin):
            chunk.append(sizes)
            taken = sum(map(sum, chunk))
            if step + 1 < end and (taken + sum(sizes)) * bytes_of <= _CHUNK_BYTES:
                continue
            batches = self._fetched(
                orders[:, start : start + taken].split([n for of_step in chunk for n in of_step], 1)
            )
            for of_step in chunk:
                yield [next(batches) for _ in of_step]
            start += taken
            chunk = []

    def _fetched(self, parts: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """Yield micro-batches as tensors, from the indices of their examples, each ``(runs, B)``."""
        if self._table is None:
            for part in parts:
                leaves = stack_leaves([self._examples.collated(indices) for indices in part.tolist()])
                if leaves is None:
                    raise CannotStackError("batches do not contain tensors of the same shapes in all trainings")
                yield leaves
            return
        # one batch after the other, each contiguous in memory
        where = torch.cat([part.flatten() for part in parts]).to(self._device)
        split = [leaf[where].split([part.numel() for part in parts]) for leaf in self._table]
        for part, of_part in zip(parts, zip(*split, strict=True), strict=True):
            yield [leaf.unflatten(0, part.shape) for leaf in of_part]

    def _comparison(self) -> RecordComparison:
        manifest = self._reference.manifest
        precision, dtype = manifest.configuration["training"]["precision"], manifest.torch_dtype
        tolerance = _TOLERANCE.get(dtype, _TOLERANCE[torch.float32]) + self._update.update.rounding
        return RecordComparison(
            [self._reference.name], precision, dtype, None, tolerance, dtype, self._device, _REASONS
        )

    def _check(self, comparison: RecordComparison, begin: int, before: Tensor, step: Taken, start: Start) -> Tensor:
        """Compare the reference with its record at a checkpoint, and reset it to the record."""
        checkpoint = self._reference.checkpoint(step.steps)
        theta = checkpoint.theta.to(self._device)[None]
        of_record = [{key: part[None].to(self._device) for key, part in state.items()} for state in checkpoint.states]
        taken = step.steps - 1
        preconditioner = self._update.preconditioner(of_record, self._schedule.hyperparameters[taken], step=taken)
        recorded = Recorded(begin, step.steps, before, theta, preconditioner)
        try:
            comparison.parameters(recorded, step.theta[:1])
        except ReplayError as error:
            if not self._is_rounding(comparison, recorded, start):
                raise CannotStackError(str(error)) from error
        step.theta[:1] = theta
        for state, known in zip(step.states, of_record, strict=True):
            for key, part in state.items():
                part[:1] = known[key]
        return theta

    def _is_rounding(self, comparison: RecordComparison, recorded: Recorded, start: Start) -> bool:
        """Return whether the reference comes out as recorded when the last digits of the checkpoint are changed.

        Rounding may put an input on the other side of a kink, after which two trainings differ by more than rounding.
        Of trainings that start within rounding of the record, some then take the Trainer's side. If the trainings
        really differ, for whatever reason, none does.
        """
        checkpoint, runs = self._reference.checkpoint(recorded.first), len(start.theta)
        exact = checkpoint.theta.to(self._device)
        buffers = {name: buffer[:1].expand_as(buffer) for name, buffer in start.buffers.items()}
        orders = start.orders[:1].expand_as(start.orders)
        generator = torch.Generator().manual_seed(0)
        for _ in range(math.ceil(_NEARBY / runs)):
            # the size of a stack: another shape would have to be traced and compiled
            digits = torch.rand(runs, len(exact), generator=generator, dtype=exact.dtype).to(self._device)
            theta = exact * (1 + torch.finfo(exact.dtype).eps * (2 * digits - 1))
            states = self._update.initial_states(theta, self._schedule.hyperparameters[0])
            if recorded.first:
                for state, of_record in zip(states, checkpoint.states, strict=True):
                    for key, part in state.items():
                        part[:] = of_record[key]
            for step in self._steps(recorded.first, recorded.last, orders, theta, states, buffers):
                theta = step.theta
            if bool(comparison.reproduced(recorded, theta).any()):
                return True
        return False
