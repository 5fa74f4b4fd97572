"""The user's own Trainer, one training after the other or several processes at a time."""

from __future__ import annotations

import functools
import logging
import time
import traceback
from collections.abc import Iterator, Sequence
from typing import ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor
from typing_extensions import override

from lightning_dtda.errors import DTDAError, RetrainingError
from lightning_dtda.processes import run_in_processes
from lightning_dtda.recording.quiet import quiet_lightning
from lightning_dtda.replay.batches import map_tensors, rows_of
from lightning_dtda.replay.silence import silent_copy
from lightning_dtda.retraining.engine import Engine, Outcome, Retraining
from lightning_dtda.retraining.task import Task
from lightning_dtda.units import human_seconds

_log = logging.getLogger(__name__)

_QUERIES_AT_A_TIME = 256
"""Queries that pass through a trained module together: bounds the memory."""


class TrainerEngine(Engine):
    """Runs the Trainer once for each training.

    Args:
        jobs: Number of processes that train at the same time; 1 trains in this one.

    Raises:
        RetrainingError: If ``jobs`` is less than 1.
    """

    name: ClassVar[str] = "trainer"

    def __init__(self, jobs: int = 1) -> None:
        if jobs < 1:
            raise RetrainingError(f"jobs={jobs}; give the number of processes, at least 1.")
        self.jobs = jobs

    @override
    def train(self, retraining: Retraining, tasks: Sequence[Task]) -> Iterator[list[Outcome]]:
        jobs, begun = min(self.jobs, len(tasks)), time.perf_counter()
        train = functools.partial(train_one, retraining)
        outcomes = (
            run_in_processes(train, tasks, jobs, "trainings", RetrainingError)
            if jobs > 1
            else ((task, train(task)) for task in tasks)
        )
        for number, (_, outcome) in enumerate(outcomes):
            if number == 0 and len(tasks) > 1:
                seconds = (time.perf_counter() - begun) * (len(tasks) - 1) / jobs
                _log.info("About %s for the other %d trainings.", human_seconds(seconds), len(tasks) - 1)
            yield [outcome]


def train_one(
    retraining: Retraining,
    task: Task,
    callbacks: Sequence[pl.Callback] = (),
    reraised: tuple[type[Exception], ...] = (),
) -> Outcome:
    """Train once and measure; whatever goes wrong becomes part of the outcome.

    Args:
        retraining: What is trained and measured.
        task: Which training.
        callbacks: To add to the Trainer's.
        reraised: What the callbacks raise, which has nothing to do with the training.
    """
    assert retraining.recipe is not None
    try:
        with quiet_lightning():
            removed = retraining.removed_in(task)
            trainer, module = retraining.recipe.fit(task.seed, removed, retraining.data, callbacks)
        return Outcome.measured(task, measure(retraining, trainer, module))
    except reraised:
        raise
    except Exception as error:  # whatever the user's code does
        if not isinstance(error, DTDAError):
            traceback.print_exc()
        return Outcome(task, None, f"{type(error).__name__}: {error}")


def measure(retraining: Retraining, trainer: pl.Trainer, module: pl.LightningModule) -> Tensor:
    """Measure a trained module in evaluation mode ``(queries,)``.

    Raises:
        RetrainingError: If the measurement does not give one number for each query.
    """
    silent = silent_copy(module).eval()
    queries = trainer.precision_plugin.convert_input(retraining.queries.all())
    queries = map_tensors(lambda leaf: leaf.to(module.device), queries)
    count = rows_of(queries)
    values = []
    with torch.no_grad():
        for start in range(0, count, _QUERIES_AT_A_TIME):
            rows = slice(start, start + _QUERIES_AT_A_TIME)
            values.append(
                retraining.measurement(silent, map_tensors(lambda leaf, rows=rows: leaf[rows], queries))  # type: ignore[misc]
            )
    measured = torch.cat(values)
    if measured.shape != (count,):
        raise RetrainingError(
            f"The measurement returned shape {tuple(measured.shape)} for {count} queries; it must return (B,) for a "
            "batch."
        )
    return measured.cpu()
