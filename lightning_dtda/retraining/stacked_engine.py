"""Many seeds and subsets of one model trained at once, on one device."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_dtda.errors import RecordingError
from lightning_dtda.recording import TrajectoryRecorder
from lightning_dtda.retraining.engine import CannotStackError, Engine, Outcome, Retraining
from lightning_dtda.retraining.stacked_group import StackedGroup
from lightning_dtda.retraining.task import Task
from lightning_dtda.retraining.trainer_engine import train_one
from lightning_dtda.retraining.watch import Watch
from lightning_dtda.trajectory import Run


class StackedEngine(Engine):
    """Trains stacks of parameters, by the operations of the module's own ``training_step``.

    Each training starts from the parameters that its seed gives, and goes through the batches that its DataLoader would
    give. The learning rates, and what else belongs to a step, are those of trainings by the Trainer: two for the first
    number of examples that is left, one for each other. These are recorded, count as trainings of their own, and are
    trained again in every stack: where they come out otherwise, stacking is refused.

    Args:
        compile: Whether ``torch.compile`` is used; ``None`` compiles where there is enough to do. It takes about half a
            minute.
    """

    name: ClassVar[str] = "stacked"

    def __init__(self, compile: bool | None = None) -> None:
        self.compile = compile

    @override
    def train(self, retraining: Retraining, tasks: Sequence[Task]) -> Iterator[list[Outcome]]:
        assert retraining.recipe is not None
        loader = retraining.recipe.loader()
        groups: dict[int, list[Task]] = defaultdict(list)
        for task in tasks:
            groups[len(retraining.removed_in(task))].append(task)
        for number, group in enumerate(groups.values()):
            yield from self._train_alike(retraining, loader, group, 1 if number else 2)

    def _train_alike(
        self, retraining: Retraining, loader: DataLoader[Any], tasks: list[Task], wanted: int
    ) -> Iterator[list[Outcome]]:
        """Train what leaves the same number of examples, by the Trainer until there are enough references."""
        remaining, watch = list(tasks), Watch()
        references: list[tuple[Task, Run]] = []
        with tempfile.TemporaryDirectory() as directory:
            while remaining and len(references) < wanted:
                # of another seed, if there is one: what depends on the seed is to be found out
                seeds = {reference.seed for reference, _ in references}
                task = next((task for task in remaining if task.seed not in seeds), remaining[0])
                remaining.remove(task)
                recorder = TrajectoryRecorder(directory, run=str(task), gradients="none")
                recorder.runs_to_fit = 0  # the disk is for a few of them only
                try:
                    outcome = train_one(retraining, task, [watch, recorder], (RecordingError, CannotStackError))
                except RecordingError as error:
                    raise CannotStackError(str(error)) from error
                yield [outcome]
                if outcome.failure is None:
                    references.append((task, Run(Path(directory) / str(task))))
            if remaining and references:
                device = watch.device if retraining.device is None else retraining.device
                yield from StackedGroup(retraining, loader, references, device).train(remaining, self.compile)
