"""Repeating recorded trainings in their recorded order, with the weights of some examples set to zero."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from time import perf_counter
from typing import ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor
from typing_extensions import override

from lightning_dtda.errors import RetrainingError
from lightning_dtda.replay import Examples, Replay, shape_key
from lightning_dtda.retraining.engine import Engine, Outcome, Retraining
from lightning_dtda.retraining.task import Task
from lightning_dtda.stacking.size import stack_size
from lightning_dtda.trajectory import Ensemble, Run

_STACKED_SECONDS = 5.0
"""Seconds that trainings would take one by one, above which they are stacked: tracing takes a second or two."""


class Reweighting(Engine):
    r"""Replays recorded runs with weights, many runs at once.

    .. math:: g_t(\theta, w) = \sum_z J_z(\theta)^\top \left(w \odot \frac{\partial L_t}{\partial z}\right),
        \qquad w_n = 0 \text{ for } n \in S

    Order, batch slots and the divisor of the loss stay the same: responses are the derivative of this function of the
    weights (arXiv 2506.12965, section 2).

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
            start, buffers = first.checkpoint(0)[0], first.buffers(0)
            first.gradient(0, start, buffers)  # the first call finds out where weights act
            started = perf_counter()
            first.gradient(0, start, buffers)
            if (perf_counter() - started) * first.steps * len(of_shape) > _STACKED_SECONDS:
                first = first.stack()
            size = stack_size(lambda: first.gradient(0, start, buffers), start, len(of_shape), first.device)  # noqa: B023
            for begin in range(0, len(of_shape), size):
                stack = of_shape[begin : begin + size]
                values = self._reweighted(first.of(runs[begin : begin + size]), retraining, stack)
                yield [Outcome.of(task, row) for task, row in zip(stack, values, strict=True)]

    def _reweighted(self, replay: Replay, retraining: Retraining, tasks: Sequence[Task]) -> Tensor:
        """Return measurements ``(tasks, queries)``."""
        weights = torch.ones(len(tasks), len(replay.examples), dtype=replay.dtype, device=replay.device)
        # with all weights equal to one, a stretch must agree with the record
        start, stop = replay.stretches[0]
        replay.compare(start, stop, replay.checkpoint(start)[0], replay.retrain(weights, start, stop)[0])
        for row, task in enumerate(tasks):
            weights[row, list(retraining.removed_in(task))] = 0
        theta, buffers = replay.retrain(weights)
        # recorded parameters need no replay
        as_recorded = torch.tensor([task.subset is None for task in tasks], device=replay.device)
        theta = torch.where(as_recorded[:, None], replay.checkpoint(replay.steps)[0], theta)
        recorded = replay.buffers(replay.steps)
        buffers = {
            name: torch.where(as_recorded.reshape(-1, *[1] * (buffer.ndim - 1)), recorded[name], buffer)
            for name, buffer in buffers.items()
        }
        return retraining.measure(replay.eager, theta, buffers, replay.time(replay.steps))
