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
    give. The learning rates, and what else belongs to a step, are those of a training by the Trainer, one for each
    number of examples that is left. It is recorded, counts as a training of its own, and is trained again in every
    stack: where it comes out otherwise, stacking is refused. Another seed is begun by the Trainer, for one step, to see
    that what was read off the first does not depend on the seed.

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
        for group in groups.values():
            yield from self._train_alike(retraining, loader, group)

    def _train_alike(
        self, retraining: Retraining, loader: DataLoader[Any], tasks: list[Task]
    ) -> Iterator[list[Outcome]]:
        """Train what leaves the same number of examples: by the Trainer until one comes to its end, then in stacks."""
        remaining, watch = list(tasks), Watch()
        with tempfile.TemporaryDirectory() as directory:
            reference: tuple[Task, Run] | None = None
            while remaining and reference is None:
                task = remaining.pop(0)
                recorder = TrajectoryRecorder(directory, run=str(task), gradients="none")
                recorder.runs_to_fit = 0  # the disk is for one of them only
                try:
                    outcome = train_one(retraining, task, [watch, recorder], (RecordingError, CannotStackError))
                except RecordingError as error:
                    raise CannotStackError(str(error)) from error
                yield [outcome]
                if outcome.failure is None:
                    reference = task, Run(Path(directory) / str(task))
            if remaining and reference is not None:
                device = watch.device if retraining.device is None else retraining.device
                group = StackedGroup(retraining, loader, reference, device)
                # of another seed, if there is one: what depends on the seed is to be found out
                seed = reference[0].seed
                group.check_another(next((task for task in remaining if task.seed != seed), remaining[0]))
                yield from group.train(remaining, self.compile)
