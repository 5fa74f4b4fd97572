"""The user's own Trainer, one training after the other or several processes at a time."""

from __future__ import annotations

import functools
import logging
import os
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import ClassVar

import cloudpickle
import joblib
import lightning.pytorch as pl
import torch
from torch import Tensor
from typing_extensions import override

from lightning_dtda.errors import DTDAError, RetrainingError
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
        outcomes = (
            _train_in_jobs(retraining, tasks, jobs) if jobs > 1 else (train_one(retraining, task) for task in tasks)
        )
        for number, outcome in enumerate(outcomes):
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


def _train_in_jobs(retraining: Retraining, tasks: Sequence[Task], jobs: int) -> Iterator[Outcome]:
    # two thread pools on the same cores are many times slower than one thread each
    threads = int(os.environ.get("OMP_NUM_THREADS", max(1, (os.cpu_count() or 1) // jobs)))
    with tempfile.TemporaryDirectory() as directory:
        # in a file, not with every task: it holds the data
        path = Path(directory) / "retraining.pickle"
        try:
            path.write_bytes(cloudpickle.dumps(retraining))
        except Exception as error:  # whatever cannot be pickled
            raise RetrainingError(
                f"Module, data, trainer or measurement cannot be sent to other processes ({type(error).__name__}: "
                f"{error}). Let the functions make what has no pickle (open files, locks, loggers), or set jobs=1."
            ) from error
        finished = 0
        with joblib.parallel_config("loky", n_jobs=jobs, inner_max_num_threads=threads):
            outcomes = joblib.Parallel(return_as="generator_unordered", batch_size=1)(
                joblib.delayed(_train_stored)(path, task) for task in tasks
            )
            try:
                for outcome in outcomes:
                    finished += 1
                    yield outcome
            except BrokenProcessPool as error:
                raise RetrainingError(
                    f"A process was killed after {finished} of {len(tasks)} trainings (out of memory?). Those are on "
                    "disk if there is an output: call again, perhaps with fewer jobs, to go on."
                ) from error


def _train_stored(path: Path, task: Task) -> Outcome:
    return train_one(_stored(path), task)


@functools.lru_cache(maxsize=1)
def _stored(path: Path) -> Retraining:
    retraining: Retraining = cloudpickle.loads(path.read_bytes())
    return retraining
