"""An engine that trains many seeds and subsets of one model at once on one device."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_dtda.errors import CannotStackError, RecordingError
from lightning_dtda.execution.quiet import quiet_lightning
from lightning_dtda.recording import TrajectoryRecorder
from lightning_dtda.recording.first_step import first_step_of
from lightning_dtda.retraining.dropping import without
from lightning_dtda.retraining.engine import Engine, Outcome, Retraining
from lightning_dtda.retraining.task import Task
from lightning_dtda.retraining.trainer_engine import train_one
from lightning_dtda.stacking.stacks import Stacks, Training
from lightning_dtda.stacking.watch import Watch
from lightning_dtda.trajectory import Run


class StackedEngine(Engine):
    """Trains stacks of parameters with the operations of the module's ``training_step``.

    Each training starts from the initial parameters of its seed and goes through the batches that its DataLoader would
    give. Learning rates and everything else that belongs to a step come from a training by the Trainer, one for each
    number of remaining examples. This training is recorded, is part of the result, and is repeated in every stack; if
    it is not reproduced, stacking is refused. For another seed, the Trainer takes one step, to check that these
    properties do not depend on the seed.

    Args:
        compile: Whether to use ``torch.compile``; ``None`` compiles if there is enough work.
    """

    name: ClassVar[str] = "stacked"

    def __init__(self, compile: bool | None) -> None:
        self.compile = compile

    @override
    def train(self, retraining: Retraining, tasks: Sequence[Task]) -> Iterator[list[Outcome]]:
        assert retraining.recipe is not None
        loader = retraining.recipe.loader()
        groups: dict[int, list[Task]] = defaultdict(list)
        for task in tasks:
            groups[len(retraining.removed_in(task))].append(task)
        for group in groups.values():
            yield from self._train_alike(retraining, loader, group)

    def _train_alike(
        self, retraining: Retraining, loader: DataLoader[Any], tasks: list[Task]
    ) -> Iterator[list[Outcome]]:
        """Train tasks with the same number of remaining examples: with the Trainer until one succeeds, then stacked."""
        remaining, watch = list(tasks), Watch()
        with tempfile.TemporaryDirectory() as directory:
            while remaining:
                task = remaining.pop(0)
                recorder = TrajectoryRecorder(directory, run=str(task), gradients="none")
                recorder.runs_to_fit = 0  # only one of them is on the disk at a time
                try:
                    outcome = train_one(retraining, task, [watch, recorder], (RecordingError, CannotStackError))
                except RecordingError as error:
                    raise CannotStackError(str(error)) from error
                yield [outcome]
                if outcome.failure is None and remaining:
                    device = watch.device if retraining.device is None else retraining.device
                    reference = task, Run(Path(directory) / str(task))
                    yield from self._stacked(retraining, loader, reference, remaining, device)
                    return

    def _stacked(
        self,
        retraining: Retraining,
        loader: DataLoader[Any],
        reference: tuple[Task, Run],
        tasks: Sequence[Task],
        device: torch.device | str,
    ) -> Iterator[list[Outcome]]:
        """Train and measure tasks at once; the reference is a task that the Trainer has done, and its record."""
        recipe, length = retraining.recipe, len(loader.dataset)  # type: ignore[arg-type]
        assert recipe is not None
        done, run = reference
        thinned = without(loader, retraining.removed_in(done))
        # with another seed if there is one, as properties of the reference may be specific to its seed
        another = next((task for task in tasks if task.seed != done.seed), tasks[0])

        def training(task: Task) -> Training:
            left = torch.ones(length, dtype=torch.bool)
            left[list(retraining.removed_in(task))] = False
            return Training(task.seed, left.nonzero()[:, 0])

        def begin(seed: int) -> tuple[pl.LightningModule, DataLoader[Any]]:
            pl.seed_everything(seed, workers=True, verbose=False)
            return recipe.module(), without(thinned, ())

        def fit(prepared: Callable[[pl.Trainer], pl.Trainer]) -> None:
            watched = replace(recipe, make_trainer=lambda: prepared(recipe.make_trainer()))
            with quiet_lightning():
                watched.fit(another.seed, retraining.removed_in(another), retraining.data)

        stacks = Stacks(run, training(done).kept, begin, recipe.examples(loader), device)
        with first_step_of(another.seed, fit) as beginning:
            stacks.check_another(beginning)
        for numbers, theta, held in stacks.train([training(task) for task in tasks], self.compile):
            found = retraining.measure(stacks.eager, theta, held, stacks.schedule.end)
            yield [Outcome.of(tasks[number], row) for number, row in zip(numbers, found, strict=True)]
