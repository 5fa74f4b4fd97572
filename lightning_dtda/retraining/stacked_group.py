"""Trainings that differ in the seed, and in which examples they are without: done in stacks, and measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.func import vmap
from torch.utils.data import DataLoader

from lightning_dtda.recording.quiet import quiet_lightning
from lightning_dtda.replay import Examples, FunctionalModule, Measurement
from lightning_dtda.replay.batches import map_tensors, rows_of
from lightning_dtda.retraining.another_seed import begun
from lightning_dtda.retraining.dropping import without
from lightning_dtda.retraining.engine import CannotStackError, Outcome, Retraining
from lightning_dtda.retraining.stacks import Reference, Stacks, Training
from lightning_dtda.retraining.task import Task
from lightning_dtda.trajectory import Run

_QUERIES_AT_A_TIME = 256
"""Queries that pass through the trained modules together: bounds the memory."""


class StackedGroup:
    """Trains and measures tasks.

    Args:
        retraining: What is trained and measured.
        loader: The training DataLoader with all examples.
        reference: A task that the Trainer did, and its record.
        device: Where to train.

    Raises:
        CannotStackError: If the reference shows that these trainings cannot be stacked.
    """

    def __init__(
        self,
        retraining: Retraining,
        loader: DataLoader[Any],
        reference: tuple[Task, Run],
        device: torch.device | str,
    ) -> None:
        recipe = retraining.recipe
        assert recipe is not None
        self._retraining = retraining
        self._recipe = recipe
        task, run = reference
        self._length: int = len(loader.dataset)  # type: ignore[arg-type]
        thinned = without(loader, retraining.removed_in(task))

        def begin(seed: int) -> tuple[pl.LightningModule, DataLoader[Any]]:
            pl.seed_everything(seed, workers=True, verbose=False)
            return recipe.module(), without(thinned, ())

        self._stacks = Stacks(Reference(self._training(task), run), begin, loader, device)
        self._queries = self._stacks.cast(retraining.queries)

    def check_another(self, task: Task) -> None:
        """Let the Trainer begin another task: what was read off the reference may have been its seed's own.

        Args:
            task: Which.

        Raises:
            CannotStackError: If it was.
        """
        recipe, removed = self._recipe, self._retraining.removed_in(task)

        def fit(prepared: Callable[[pl.Trainer], pl.Trainer]) -> None:
            watched = replace(recipe, make_trainer=lambda: prepared(recipe.make_trainer()))
            with quiet_lightning():
                watched.fit(task.seed, removed, self._retraining.data)

        with begun(task.seed, fit) as run:
            self._stacks.check_another(run)

    def train(self, tasks: Sequence[Task], compile: bool | None) -> Iterator[list[Outcome]]:
        """Train and measure, as many at once as is fastest.

        Args:
            tasks: Which.
            compile: As for :class:`~lightning_dtda.retraining.stacked_engine.StackedEngine`.

        Raises:
            CannotStackError: If the reference does not come out as the Trainer had it.
        """
        measurement = self._retraining.measurement
        for numbers, theta, held in self._stacks.train([self._training(task) for task in tasks], compile):
            values = measure(self._stacks.module, theta, held, self._queries, measurement)
            yield [Outcome.measured(tasks[number], row) for number, row in zip(numbers, values, strict=True)]

    def _training(self, task: Task) -> Training:
        left = torch.ones(self._length, dtype=torch.bool)
        left[list(self._retraining.removed_in(task))] = False
        return Training(task.seed, left.nonzero()[:, 0])


def measure(
    module: FunctionalModule, theta: Tensor, buffers: dict[str, Tensor], queries: Examples, measurement: Measurement
) -> Tensor:
    """Measure trained modules ``(runs, queries)``.

    Args:
        module: The module.
        theta: Trained parameters ``(runs, P)``.
        buffers: Buffers and frozen parameters by name, each ``(runs, ...)``.
        queries: What is measured on.
        measurement: m.

    Raises:
        CannotStackError: If the measurement cannot be taken of several modules at once.
    """
    module.set_clock(0, 0)  # as when it is taken of a single trained module
    batch = queries.all()
    count, values = rows_of(batch), []
    for begin in range(0, count, _QUERIES_AT_A_TIME):
        rows = slice(begin, begin + _QUERIES_AT_A_TIME)
        part = map_tensors(lambda leaf, rows=rows: leaf[rows], batch)  # type: ignore[misc]

        def of_one(theta: Tensor, buffers: dict[str, Tensor], part: Any = part) -> Tensor:
            return module.measure(theta, buffers, part, measurement)

        try:
            with torch.no_grad():
                values.append(vmap(of_one)(theta, buffers))
        except Exception as error:  # whatever the user's code does
            raise CannotStackError(f"the measurement cannot be taken of several models at once ({error!r})") from error
    measured = torch.cat(values, 1)
    if measured.shape != (len(theta), count):
        raise CannotStackError(f"the measurement returned shape {tuple(measured.shape[1:])} for {count} queries")
    return measured.cpu()
