"""Repeating recorded trainings in their recorded order, with the weights of some examples set to zero."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor
from typing_extensions import override

from lightning_dtda.errors import RetrainingError
from lightning_dtda.replay import Examples, Replay, shape_key
from lightning_dtda.retraining.engine import Engine, Outcome, Retraining
from lightning_dtda.retraining.task import Task
from lightning_dtda.stacking.reweighted import prepared, without
from lightning_dtda.trajectory import Ensemble, Run


class Reweighting(Engine):
    """Replays recorded runs with weights of zero, many at once; see :mod:`lightning_dtda.stacking.reweighted`.

    Args:
        ensemble: Recorded runs.
        module: Module that was trained; its weights are not used.
        examples: Examples that it was trained on.

    Raises:
        RetrainingError: If a run has no seed, or two runs have the same seed.
    """

    name: ClassVar[str] = "replay"

    def __init__(self, ensemble: Ensemble, module: pl.LightningModule, examples: Examples) -> None:
        self.module = module
        self.examples = examples
        self.runs: dict[int, Run] = {}
        for run in ensemble:
            seed = run.manifest.seed
            if seed is None or seed in self.runs:
                what = "no seed" if seed is None else f"the seed of {self.runs[seed].path}, {seed}"
                raise RetrainingError(
                    f"{run.path} has {what}; the trainings of a ground truth are identified by their seeds. Record "
                    "runs with seed_everything(seed) and a different seed for each run."
                )
            self.runs[seed] = run

    @override
    def train(self, retraining: Retraining, tasks: Sequence[Task]) -> Iterator[list[Outcome]]:
        def key(task: Task) -> str:
            return repr(shape_key(self.runs[task.seed]))

        for _, alike in groupby(sorted(tasks, key=key), key):
            of_shape = list(alike)
            runs = [self.runs[task.seed] for task in of_shape]
            first = Replay(runs[:1], self.module, self.examples, device=retraining.device)
            first, size = prepared(first, len(of_shape))
            for begin in range(0, len(of_shape), size):
                stack = of_shape[begin : begin + size]
                values = self._reweighted(first.of(runs[begin : begin + size]), retraining, stack)
                yield [Outcome.of(task, row) for task, row in zip(stack, values, strict=True)]

    def _reweighted(self, replay: Replay, retraining: Retraining, tasks: Sequence[Task]) -> Tensor:
        """Return measurements ``(tasks, queries)``."""
        theta, buffers = without(replay, [retraining.removed_in(task) for task in tasks])
        # recorded trainings need no replay
        as_recorded = torch.tensor([task.subset is None for task in tasks], device=replay.device)
        recorded, recorded_buffers = replay.trained(replay.steps)
        theta = torch.where(as_recorded[:, None], recorded, theta)
        buffers = {
            name: torch.where(as_recorded.reshape(-1, *[1] * (buffer.ndim - 1)), recorded_buffers[name], buffer)
            for name, buffer in buffers.items()
        }
        return retraining.measure(replay.eager, theta, buffers, replay.time(replay.steps))
