"""Stacks of trainings that differ in the seed, and in which examples they are without, but not in how many."""

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
"""Trainings at once with which the search for the fastest number begins, and how many times as many it tries next.

Each size is traced, which takes as long as dozens of steps. On the CPU, a training's share of a step took 0.028 ms at
32 and 0.021 ms at 128 for a network of 5,000 parameters; for one of 200,000, which leaves the caches, 0.44 ms and
0.71 ms."""

_GAIN = 0.95
"""That many more at once are worth the memory if all together then take less than this share of the time."""

_TIMED = 5
"""Steps that are timed, of which the fastest counts."""

_COMPILED_SHARE, _COMPILE_SECONDS = 0.15, 60.0
"""What compiling saves of the time (a small MLP on the CPU), and what it costs, with some to spare."""


@dataclass(frozen=True)
class Training:
    """One training.

    Args:
        seed: What ``seed_everything`` is called with.
        kept: Data set indices of the examples that it is trained on ``(examples,)``.
    """

    seed: int
    kept: Tensor


@dataclass(frozen=True)
class Drawn:
    """What a seed gives.

    Args:
        theta: Initial parameters ``(P,)``.
        buffers: Buffers and frozen parameters by name.
        positions: Of examples in order, among those that are kept ``(examples,)``.
    """

    theta: Tensor
    buffers: dict[str, Tensor]
    positions: Tensor


Watched: TypeAlias = Callable[[range, Start], AbstractContextManager[Callable[[Taken], None]]]
"""Given which trainings are in a stack and what it begins with (its last rows are for the same training where there are
more than trainings), a context in which it trains; called with each step."""


class Stacks:
    """Makes, checks and sizes stacks.

    Args:
        reference: The record of a training by the Trainer; it is in every stack.
        kept: Data set indices of the examples that it was trained on.
        begin: Begins a training, without as many examples as the reference.
        examples: The training examples, all of them.
        device: Where to train.

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
        """For measurements of what was trained."""

    def _replica(self) -> Replica:
        dtype, datamodule = self._reference.manifest.torch_dtype, self._examples.datamodule
        return Replica(self._module, self._layout, self._circumstances, dtype, self.device, datamodule=datamodule)

    def check_another(self, other: Run) -> None:
        """Make sure that another training is as the reference says: what was read off that may be its seed's own.

        Args:
            other: The record of its first steps by the Trainer.

        Raises:
            CannotStackError: If it is not.
        """
        first = vars(Schedule.of(other))
        if any(getattr(self.schedule, part)[: other.steps] != values for part, values in first.items()):
            raise CannotStackError("what the optimizer is told, or the size of the batches, depends on the seed")
        self._check(other)

    def _check(self, run: Run) -> tuple[pl.LightningModule, Drawn]:
        """Make sure that a training by the Trainer began, and went on, as its seed alone says; return with what.

        Raises:
            CannotStackError: If it did not.
        """
        module, drawn = self._draw(seed_of(run))
        initial, order = run.checkpoint(0), recorded_order(run)
        if not torch.equal(drawn.positions[: len(order)], order):
            raise CannotStackError("the order of examples is not the one that the seed and the DataLoader give")
        if not torch.equal(drawn.theta, initial.theta) or not _same(drawn.buffers, initial.buffers):
            raise CannotStackError(
                "the initial parameters are not those that the module is made with: hooks or callbacks change them"
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
        """Train, as many at once as is fastest.

        Args:
            trainings: Which.
            compile: As for :func:`~lightning_dtda.retrain`.
            watched: Gets to see every step.
            beside: Memory that each training takes beside its own steps.
            largest: Number of trainings at once, at most.

        Returns:
            For each stack, the positions of its trainings, their trained parameters ``(trainings, P)`` and buffers.

        Raises:
            CannotStackError: If the reference does not come out as the Trainer had it.
        """
        with kept_pages(self.device), torch.no_grad():
            gradient = self._gradient()
            training = StackedTraining(self._examples, self._reference, self.schedule, gradient, self.device)
            size, seconds = self._fastest(training, gradient, len(trainings), largest, beside)
            stacks = math.ceil(len(trainings) / (size - 1))
            size = math.ceil(len(trainings) / stacks)
            ahead = stacks * len(self.schedule.sizes) * seconds
            compiles = ahead * _COMPILED_SHARE > _COMPILE_SECONDS if compile is None else compile
            _log.info(
                "Stacking %d more, %d at a time: about %s%s.",
                len(trainings),
                size,
                human_seconds(ahead),
                ", less what compiling will save" if compiles else "",
            )
            gradient.compiled = compiles
            for begin in range(0, len(trainings), size):
                stack = list(trainings[begin : begin + size])
                numbers = range(begin, begin + len(stack))
                # the last one as large as the others: another shape would be traced, and compiled, anew
                filled = stack + [stack[-1]] * (size - len(stack))
                start = self._start([self._of_reference, *filled])
                try:
                    with watched(numbers, start) as taken:
                        theta, held = training.train(start, taken)
                except CannotStackError as error:
                    if not gradient.traced:
                        raise
                    # constants of the trace may be what differs: what depends on the clock at some times only
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
        """Return what a stack of trainings begins with."""
        drawn = {self._of_reference.seed: self._drawn}  # one seed is there for several subsets
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
        """Return how many at once, with the reference, are fastest for all, of those that fit, and a step's seconds."""
        one = self._start([self._of_reference])
        batches = next(training.batches(one.orders, 0, 1))

        def step() -> Tensor:
            return training.gradient(0, one.theta, one.buffers, batches)

        gradient.traced = False  # it takes no less memory, and a trace is for one number of trainings
        step()  # what is made once, and kept, does not count
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
        """Time the first step of a training, so many times over: by what it costs, and by the clock on the wall.

        What it costs on the CPU is the time that this process had of it, whatever else the machine does.
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
        # the first one traces
        cost, wall = (min(column) for column in zip(*times[1:], strict=True))
        return cost, wall

    def _draw(self, seed: int) -> tuple[pl.LightningModule, Drawn]:
        """Return what a training with a seed begins with, and its module."""
        module, positions = self._orders.draw(seed)
        if self._circumstances.precision == "64-true":
            module.double()  # as the Trainer's precision does
        try:
            theta = self._layout.flatten([module.get_parameter(name) for name in self._layout.names])
        except AttributeError as error:
            raise CannotStackError(f"the module has no parameters before it is trained ({error})") from error
        held = {name: tensor.detach() for name, tensor in buffers(module, self._layout, 0).items()}
        return module, Drawn(theta, held, positions)


def _refuse(run: Run) -> None:
    """Refuse what a stack does not follow.

    Raises:
        CannotStackError: Naming it.
    """
    planned = run.manifest.planned_steps
    if planned is not None and run.steps < planned:
        raise CannotStackError(
            f"the training of seed {seed_of(run)} ended after {run.steps} of {planned} steps: what ended it may end "
            "each training at another step"
        )
    if any(part.rng_states for step in range(run.steps) for part in run.micro_batches(step)):
        raise CannotStackError("training_step draws random numbers (dropout?), which differ for each training")
    before, after = run.checkpoint(0).buffers, run.checkpoint(run.steps).buffers
    if changing := sorted(name for name, buffer in after.items() if not torch.equal(buffer, before[name])):
        raise CannotStackError(f"buffers change in training, which stacks do not follow: {', '.join(changing)}")


def _same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
