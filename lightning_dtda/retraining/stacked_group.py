"""Trainings that differ in the seed, and in which examples they are without: done in stacks, and measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from lightning_dtda.recording.quiet import quiet_lightning
from lightning_dtda.retraining.another_seed import begun
from lightning_dtda.retraining.dropping import without
from lightning_dtda.retraining.engine import Outcome, Retraining
from lightning_dtda.retraining.stacks import Reference, Stacks, Training
from lightning_dtda.retraining.task import Task
from lightning_dtda.trajectory import Run


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

        self._stacks = Stacks(Reference(self._training(task), run), begin, recipe.examples(loader), device)

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
        stacks = self._stacks
        for numbers, theta, held in stacks.train([self._training(task) for task in tasks], compile):
            found = self._retraining.measure(stacks.eager, theta, held, stacks.schedule.end)
            yield [Outcome.measured(tasks[number], row) for number, row in zip(numbers, found, strict=True)]

    def _training(self, task: Task) -> Training:
        left = torch.ones(self._length, dtype=torch.bool)
        left[list(self._retraining.removed_in(task))] = False
        return Training(task.seed, left.nonzero()[:, 0])
