"""Stacks of trainings that differ in the seed and in which examples are left out, but not in how many."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TypeAlias

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_dtda.compatibility import tree_flatten
from lightning_dtda.errors import CannotStackError
from lightning_dtda.execution.memory import kept_pages, peak_memory
from lightning_dtda.replay import Eager, Examples
from lightning_dtda.replay.replica import Replica, buffers
from lightning_dtda.replay.stand_ins import Circumstances
from lightning_dtda.stacking.batch_orders import BatchOrders, Begin, recorded_order, seed_of
from lightning_dtda.stacking.gradient import StackedGradient
from lightning_dtda.stacking.size import LARGEST, NOTHING, Footprint, fitting
from lightning_dtda.stacking.training import Schedule, StackedTraining, Start, Taken
from lightning_dtda.trajectory import Run
from lightning_dtda.units import human_seconds

_log = logging.getLogger(__name__)

_FIRST_SIZE, _GROWTH = 32, 4
"""Stack size at which the search for the fastest one starts, and the factor by which it grows.

Each size is traced, which takes as long as dozens of steps. On the CPU, a training's share of a step took 0.028 ms at
32 and 0.021 ms at 128 for a network of 5,000 parameters; for one of 200,000, which no longer fits in the caches,
0.44 ms and 0.71 ms."""

_GAIN = 0.95
"""Share of the time below which a larger stack is worth its memory."""

_TIMED = 5
"""Number of steps to time; the fastest counts."""

_COMPILED_SHARE, _COMPILE_SECONDS = 0.15, 60.0
"""Share of the time that compiling saves (a small MLP on the CPU), and seconds it costs, with a margin."""

_WORTH_ANNOUNCING = 5.0
"""Seconds from which on the expected time is logged."""


@dataclass(frozen=True)
class Training:
    """One training.

    Args:
        seed: Argument of ``seed_everything``.
        kept: Data set indices of the examples to train on ``(examples,)``.
    """

    seed: int
    kept: Tensor


@dataclass(frozen=True)
class Drawn:
    """Initial state and order of examples for a seed.

    Args:
        theta: Initial parameters ``(P,)``.
        buffers: Buffers and frozen parameters by name.
        positions: Positions of the examples, in training order, among those kept ``(examples,)``.
    """

    theta: Tensor
    buffers: dict[str, Tensor]
    positions: Tensor


Watched: TypeAlias = Callable[[range, Start], AbstractContextManager[Callable[[Taken], None]]]
"""Function from the trainings in a stack and its initial state to a context manager to train in, whose value is called
with each step. If the stack has more rows than trainings, its last rows repeat the last training."""


class Stacks:
    """Makes, checks and sizes stacks.

    Args:
        reference: Record of a training by the Trainer; it is part of every stack.
        kept: Data set indices of the examples that the reference was trained on.
        begin: Function that starts a training, with the same number of examples as the reference.
        examples: All training examples.
        device: Device to train on.

    Raises:
        CannotStackError: If the reference shows that these trainings cannot be stacked.
    """

    def __init__(
        self, reference: Run, kept: Tensor, begin: Begin, examples: Examples, device: torch.device | str
    ) -> None:
        self._reference = reference
        self.device = torch.device(device)
        _refuse(reference)
        self._of_reference = Training(seed_of(reference), kept)
        self.schedule = Schedule.of(reference)
        self._layout, self._examples = reference.layout, examples
        self._circumstances = Circumstances.of(reference.manifest)
        self._orders = BatchOrders(begin, reference)
        self._module, self._drawn = self._check(reference)
        self.eager = Eager(self._replica())
        """Replay for measuring the trained models."""

    def _replica(self) -> Replica:
        dtype, datamodule = self._reference.manifest.torch_dtype, self._examples.datamodule
        return Replica(self._module, self._layout, self._circumstances, dtype, self.device, datamodule=datamodule)

    def check_another(self, other: Run) -> None:
        """Check a training with another seed, as some properties of the reference may be specific to its seed.

        Args:
            other: Record of the first steps of the other training by the Trainer.

        Raises:
            CannotStackError: If it does not follow from the reference.
        """
        first = vars(Schedule.of(other))
        if any(getattr(self.schedule, part)[: other.steps] != values for part, values in first.items()):
            raise CannotStackError("the optimizer's hyperparameters or the batch sizes depend on the seed")
        self._check(other)

    def _check(self, run: Run) -> tuple[pl.LightningModule, Drawn]:
        """Check that the initial state and the order of examples of a training follow from its seed, and return both.

        Raises:
            CannotStackError: If they do not.
        """
        module, drawn = self._draw(seed_of(run))
        initial, order = run.checkpoint(0), recorded_order(run)
        if not torch.equal(drawn.positions[: len(order)], order):
            raise CannotStackError("the order of examples does not follow from the seed and the DataLoader")
        if not torch.equal(drawn.theta, initial.theta) or not _same(drawn.buffers, initial.buffers):
            raise CannotStackError(
                "the initial parameters are not those of the newly created module: hooks or callbacks change them"
            )
        return module, drawn

    def train(
        self,
        trainings: Sequence[Training],
        compile: bool | None,
        watched: Watched = lambda numbers, start: nullcontext(lambda step: None),
        beside: Footprint = NOTHING,
        largest: int = LARGEST,
    ) -> Iterator[tuple[range, Tensor, dict[str, Tensor]]]:
        """Train in stacks of the fastest size.

        Args:
            trainings: The trainings.
            compile: As for :func:`~lightning_dtda.retrain`.
            watched: Observer of every step.
            beside: Additional memory of each training, besides its steps.
            largest: Maximum number of trainings at once.

        Yields:
            For each stack, the positions of its trainings, their trained parameters ``(trainings, P)`` and buffers.

        Raises:
            CannotStackError: If the reference does not reproduce the Trainer's result.
        """
        with kept_pages(self.device), torch.no_grad():
            gradient = self._gradient()
            training = StackedTraining(self._examples, self._reference, self.schedule, gradient, self.device)
            size, seconds = self._fastest(training, gradient, len(trainings), largest, beside)
            stacks = math.ceil(len(trainings) / (size - 1))
            size = math.ceil(len(trainings) / stacks)
            ahead = stacks * len(self.schedule.sizes) * seconds
            compiles = ahead * _COMPILED_SHARE > _COMPILE_SECONDS if compile is None else compile
            if ahead >= _WORTH_ANNOUNCING:
                _log.info(
                    "Stacking %d more trainings, %d at a time: about %s%s.",
                    len(trainings),
                    size,
                    human_seconds(ahead),
                    ", less the time that compiling saves" if compiles else "",
                )
            gradient.compiled = compiles
            for begin in range(0, len(trainings), size):
                stack = list(trainings[begin : begin + size])
                numbers = range(begin, begin + len(stack))
                # pad the last stack to the size of the others: another shape would have to be traced and compiled
                filled = stack + [stack[-1]] * (size - len(stack))
                start = self._start([self._of_reference, *filled])
                try:
                    with watched(numbers, start) as taken:
                        theta, held = training.train(start, taken)
                except CannotStackError as error:
                    if not gradient.traced:
                        raise
                    # constants of the trace may be the cause: something that depends on the time only at some times
                    _log.info("Stacking without a trace: %s", error.reason)
                    gradient.traced = False
                    with watched(numbers, start) as taken:
                        theta, held = training.train(start, taken)
                rows = slice(1, 1 + len(stack))
                yield numbers, theta[rows], {name: buffer[rows] for name, buffer in held.items()}

    def _gradient(self) -> StackedGradient:
        structure = tree_flatten(self._examples.collated([0]))[1]
        return StackedGradient(self._replica(), structure, self.schedule.times)

    def _start(self, trainings: Sequence[Training]) -> Start:
        """Return the initial state of a stack of trainings."""
        drawn = {self._of_reference.seed: self._drawn}  # several subsets may share a seed
        for training in trainings:
            if training.seed not in drawn:
                drawn[training.seed] = self._draw(training.seed)[1]
        of_each = [drawn[training.seed] for training in trainings]
        stacked = {
            name: torch.stack([one.buffers[name] for one in of_each]).to(self.device) for name in of_each[0].buffers
        }
        orders = [training.kept[one.positions] for training, one in zip(trainings, of_each, strict=True)]
        return Start(torch.stack([one.theta for one in of_each]).to(self.device), stacked, torch.stack(orders))

    def _fastest(
        self, training: StackedTraining, gradient: StackedGradient, trainings: int, largest: int, beside: Footprint
    ) -> tuple[int, float]:
        """Return the fastest stack size that fits in memory, including the reference, and the seconds per step."""
        one = self._start([self._of_reference])
        batches = next(training.batches(one.orders, 0, 1))

        def step() -> Tensor:
            return training.gradient(0, one.theta, one.buffers, batches)

        gradient.traced = False  # takes at least as much memory, and a trace is for one stack size only
        step()  # one-time allocations do not count
        most = min(1 + min(trainings, largest), fitting(peak_memory(step, self.device), one.theta, self.device, beside))
        gradient.traced = True
        if most <= 1:
            raise CannotStackError("there is not enough memory for several trainings at once")

        def of_all(size: int, cost: float) -> float:
            return math.ceil(trainings / (size - 1)) * cost  # the reference is in every stack

        size = min(_FIRST_SIZE, most)
        cost, seconds = self._timed(training, one, size)
        while size < most:
            larger = min(_GROWTH * size, most)
            cost_of_larger, seconds_of_larger = self._timed(training, one, larger)
            if of_all(larger, cost_of_larger) > _GAIN * of_all(size, cost):
                break
            size, cost, seconds = larger, cost_of_larger, seconds_of_larger
        return size, seconds

    def _timed(self, training: StackedTraining, one: Start, size: int) -> tuple[float, float]:
        """Time the first step of a stack of ``size`` copies of a training: return its cost, and the wall-clock time.

        On the CPU, the cost is the CPU time of this process, which does not depend on the load of the machine.
        """
        theta = one.theta.expand(size, -1).clone()
        held = {name: buffer.expand(size, *buffer.shape[1:]).clone() for name, buffer in one.buffers.items()}
        batches = next(training.batches(one.orders.expand(size, -1), 0, 1))
        on_cuda = self.device.type == "cuda"
        times = []
        for _ in range(_TIMED + 1):
            cpu, wall = time.process_time(), time.perf_counter()
            training.gradient(0, theta, held, batches)
            if on_cuda:
                torch.cuda.synchronize(self.device)
            seconds = time.perf_counter() - wall
            times.append((seconds if on_cuda else time.process_time() - cpu, seconds))
        # the first step traces
        cost, wall = (min(column) for column in zip(*times[1:], strict=True))
        return cost, wall

    def _draw(self, seed: int) -> tuple[pl.LightningModule, Drawn]:
        """Return the module of a training with a seed, its initial state and its order of examples."""
        module, positions = self._orders.draw(seed)
        if self._circumstances.precision == "64-true":
            module.double()  # as the Trainer's precision does
        try:
            theta = self._layout.flatten([module.get_parameter(name) for name in self._layout.names])
        except AttributeError as error:
            raise CannotStackError(f"the module creates its parameters only in training ({error})") from error
        held = {name: tensor.detach() for name, tensor in buffers(module, self._layout, 0).items()}
        return module, Drawn(theta, held, positions)


def _refuse(run: Run) -> None:
    """Check that a run does nothing that stacks do not support.

    Raises:
        CannotStackError: If it does. The reason names it.
    """
    planned = run.manifest.planned_steps
    if planned is not None and run.steps < planned:
        raise CannotStackError(
            f"the training of seed {seed_of(run)} ended after {run.steps} of {planned} steps, so others may end at "
            "different steps"
        )
    if any(part.rng_states for step in range(run.steps) for part in run.micro_batches(step)):
        raise CannotStackError("training_step draws random numbers (dropout?), which differ between trainings")
    before, after = run.checkpoint(0).buffers, run.checkpoint(run.steps).buffers
    if changing := sorted(name for name, buffer in after.items() if not torch.equal(buffer, before[name])):
        raise CannotStackError(f"buffers change during training, which stacks do not support: {', '.join(changing)}")


def _same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
