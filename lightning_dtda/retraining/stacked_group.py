"""Trainings that differ in the seed, and in which examples they are without, but not in how many."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten
from torch.utils.data import DataLoader

from lightning_dtda.estimators.memory import kept_pages, peak_memory
from lightning_dtda.recording.run_recording import buffers
from lightning_dtda.replay import Examples, FunctionalModule
from lightning_dtda.retraining.batch_orders import BatchOrders, recorded_order, seed_of
from lightning_dtda.retraining.dropping import without
from lightning_dtda.retraining.engine import CannotStackError, Outcome, Retraining
from lightning_dtda.retraining.stack_size import fitting
from lightning_dtda.retraining.stacked_gradient import StackedGradient
from lightning_dtda.retraining.stacked_training import Schedule, StackedTraining, Start
from lightning_dtda.retraining.task import Task
from lightning_dtda.trajectory import Run
from lightning_dtda.units import human_seconds

_log = logging.getLogger(__name__)

_FIRST_SIZE = 32
"""Trainings at once with which the search for the fastest number begins; it doubles them."""

_GAIN = 0.95
"""Twice as many at once are worth the memory if each then takes less than this share of the time."""

_TIMED = 5
"""Steps that are timed, of which the fastest counts."""

_COMPILED_SHARE, _COMPILE_SECONDS = 0.15, 60.0
"""What compiling saves of the time (a small MLP on the CPU), and what it costs, with some to spare."""


Drawn: TypeAlias = tuple[Tensor, dict[str, Tensor], Tensor]
"""What a seed gives: parameters ``(P,)``, buffers and frozen parameters, and positions of examples in order."""


@dataclass(frozen=True)
class Reference:
    """A training that the Trainer did.

    Args:
        task: Which.
        run: Its record.
    """

    task: Task
    run: Run


class StackedGroup:
    """Makes, checks and measures stacks.

    Args:
        retraining: What is trained and measured.
        loader: The training DataLoader with all examples.
        references: Trainings by the Trainer, at least one.
        device: Where to train.

    Raises:
        CannotStackError: If the references show that these trainings cannot be stacked.
    """

    def __init__(
        self,
        retraining: Retraining,
        loader: DataLoader[Any],
        references: Sequence[Reference],
        device: torch.device | str,
    ) -> None:
        assert retraining.recipe is not None
        self._retraining = retraining
        self._references = references
        self._device = torch.device(device)
        runs = [reference.run for reference in references]
        first = runs[0].manifest
        self._schedule = Schedule.of(runs[0])
        if any(Schedule.of(run) != self._schedule for run in runs[1:]):
            raise CannotStackError("the number of steps, or what the optimizer is told at them, depends on the seed")
        for run in runs:
            _refuse(run)
        self._layout = first.layout
        # as the Trainer's precision does with batches
        cast = (torch.float32, first.torch_dtype)
        wanted = cast if first.configuration["training"]["precision"] == "64-true" else (first.torch_dtype,) * 2
        self._examples = Examples(loader.dataset, loader.collate_fn).to(wanted, self._device)
        self._queries = retraining.queries.to(wanted, self._device)
        self._length: int = len(loader.dataset)  # type: ignore[arg-type]
        thinned = without(loader, retraining.removed_in(references[0].task))
        self._orders = BatchOrders(retraining.recipe, thinned, runs[0])
        self._of_references = {seed_of(run): self._checked(run) for run in runs}
        self._module = FunctionalModule(
            self._orders.draw(seed_of(runs[0]))[0],
            self._layout,
            first.evaluation_modules,
            device=self._device,
        )
        if self._module.statistics:
            raise CannotStackError(
                f"BatchNorm keeps running statistics ({self._module.statistics[0]}), which stacks do not follow"
            )

    def train(self, tasks: Sequence[Task], compile: bool | None) -> Iterator[list[Outcome]]:
        """Train and measure, as many at once as is fastest.

        Args:
            tasks: Which.
            compile: As for :class:`~lightning_dtda.retraining.stacked_engine.StackedEngine`.

        Raises:
            CannotStackError: If a reference does not come out as the Trainer had it.
        """
        own = len(self._references)
        with kept_pages(self._device), torch.no_grad():
            training = self._training()
            size, seconds = self._fastest(training, len(tasks) + own)
            stacks = math.ceil(len(tasks) / max(size - own, 1))
            size = math.ceil(len(tasks) / stacks)
            ahead = stacks * len(self._schedule.sizes) * seconds
            compiles = ahead * _COMPILED_SHARE > _COMPILE_SECONDS if compile is None else compile
            _log.info(
                "Stacking %d trainings, %d at a time: about %s%s.",
                len(tasks),
                size,
                human_seconds(ahead),
                ", less what compiling will save" if compiles else "",
            )
            if compiles:
                training = self._training(compiled=True)
            for begin in range(0, len(tasks), size):
                stack = list(tasks[begin : begin + size])
                # the last one as large as the others: another shape would be traced, and compiled, anew
                filled = stack + [stack[-1]] * (size - len(stack))
                start = self._start([*(reference.task for reference in self._references), *filled])
                try:
                    theta, held = training.train(start)
                except CannotStackError as error:
                    if not training.traced:
                        raise
                    # constants of the trace may be what differs: the epoch, the number of the batch
                    _log.info("Stacking without a trace: %s", error.reason)
                    training = self._training(traced=False)
                    theta, held = training.train(start)
                rows = slice(own, own + len(stack))
                values = training.measure(
                    theta[rows],
                    {name: buffer[rows] for name, buffer in held.items()},
                    self._queries,
                    self._retraining.measurement,
                )
                yield [Outcome.measured(task, row) for task, row in zip(stack, values, strict=True)]

    def _training(self, traced: bool = True, compiled: bool = False) -> StackedTraining:
        structure = tree_flatten(self._examples.fetch(torch.zeros(1, dtype=torch.long)))[1]
        return StackedTraining(
            self._module,
            self._examples,
            [reference.run for reference in self._references],
            self._schedule,
            StackedGradient(self._module, structure, traced, compiled),
            self._device,
        )

    def _start(self, tasks: Sequence[Task]) -> Start:
        """Return what a stack of trainings begins with."""
        thetas, held, orders = [], [], []
        drawn: dict[int, Drawn] = {}  # one seed is there for several subsets
        for task in tasks:
            if task.seed not in drawn:
                drawn[task.seed] = self._of_references.get(task.seed) or self._draw(task.seed)
            theta, buffers_of, positions = drawn[task.seed]
            thetas.append(theta)
            held.append(buffers_of)
            orders.append(self._kept(task)[positions])
        stacked = {name: torch.stack([of_one[name] for of_one in held]).to(self._device) for name in held[0]}
        return Start(torch.stack(thetas).to(self._device), stacked, torch.stack(orders))

    def _kept(self, task: Task) -> Tensor:
        """Return the indices of the examples that are left."""
        left = torch.ones(self._length, dtype=torch.bool)
        left[list(self._retraining.removed_in(task))] = False
        return left.nonzero()[:, 0]

    def _fastest(self, training: StackedTraining, trainings: int) -> tuple[int, float]:
        """Return how many trainings at once are fastest for each, of those that fit, and the seconds of a step."""
        one, own = self._start([self._references[0].task]), len(self._references)
        batches = next(training.batches(one.orders))

        def step() -> Tensor:
            return training.gradient(0, one.theta, one.buffers, batches)

        step()  # what is made once, and kept, does not count
        most = min(trainings, fitting(peak_memory(step, self._device), one.theta, self._device))
        if most <= own:
            raise CannotStackError("there is not enough memory for several trainings at once")
        size = min(max(_FIRST_SIZE, own + 1), most)
        cost, seconds = self._timed(training, one, size)
        while size < most:
            larger = min(2 * size, most)
            cost_of_larger, seconds_of_larger = self._timed(training, one, larger)
            # the references are in every stack
            if cost_of_larger / (larger - own) > _GAIN * cost / (size - own):
                break
            size, cost, seconds = larger, cost_of_larger, seconds_of_larger
        return size, seconds

    def _timed(self, training: StackedTraining, one: Start, size: int) -> tuple[float, float]:
        """Time the first step of a training, so many times over: by what it costs, and by the clock on the wall.

        What it costs on the CPU is the time that this process had of it, whatever else the machine does.
        """
        theta = one.theta.expand(size, -1).clone()
        held = {name: buffer.expand(size, *buffer.shape[1:]).clone() for name, buffer in one.buffers.items()}
        batches = next(training.batches(one.orders.expand(size, -1)))
        on_cuda = self._device.type == "cuda"
        times = []
        for _ in range(_TIMED + 1):
            cpu, wall = time.process_time(), time.perf_counter()
            training.gradient(0, theta, held, batches)
            if on_cuda:
                torch.cuda.synchronize(self._device)
            seconds = time.perf_counter() - wall
            times.append((seconds if on_cuda else time.process_time() - cpu, seconds))
        # the first one traces
        cost, wall = (min(column) for column in zip(*times[1:], strict=True))
        return cost, wall

    def _draw(self, seed: int) -> Drawn:
        """Return what a training with a seed begins with."""
        module, positions = self._orders.draw(seed)
        try:
            theta = self._layout.flatten([module.get_parameter(name) for name in self._layout.names])
        except AttributeError as error:
            raise CannotStackError(f"the module has no parameters before it is trained ({error})") from error
        return theta, {name: tensor.detach() for name, tensor in buffers(module, self._layout, 0).items()}, positions

    def _checked(self, run: Run) -> Drawn:
        """Make sure that a reference began, and went on, as its seed alone says; return with what."""
        theta, held, positions = self._draw(seed_of(run))
        recorded = run.checkpoint(0)
        if not torch.equal(positions, recorded_order(run)):
            raise CannotStackError("the order of examples is not the one that the seed and the DataLoader give")
        if not torch.equal(theta, recorded.theta) or not _same(held, recorded.buffers):
            raise CannotStackError(
                "the initial parameters are not those that the module is made with: hooks or callbacks change them"
            )
        return theta, held, positions


def _refuse(run: Run) -> None:
    """Refuse what a stack does not follow.

    Raises:
        CannotStackError: Naming it.
    """
    if any(part.rng_states for step in range(run.steps) for part in run.micro_batches(step)):
        raise CannotStackError("training_step draws random numbers (dropout?), which differ for each training")
    begun, ended = run.checkpoint(0).buffers, run.checkpoint(run.steps).buffers
    if changing := sorted(name for name, buffer in ended.items() if not torch.equal(buffer, begun[name])):
        raise CannotStackError(f"buffers change in training, which stacks do not follow: {', '.join(changing)}")


def _same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
