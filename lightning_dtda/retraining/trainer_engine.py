"""The user's Trainer, once for each training, in this process or on workers."""

from __future__ import annotations

import functools
import logging
import time
import traceback
from collections.abc import Iterator, Sequence
from typing import ClassVar

import lightning.pytorch as pl
from torch import Tensor
from typing_extensions import override

from lightning_dtda.errors import DTDAError, RetrainingError
from lightning_dtda.execution import Lost, Workers
from lightning_dtda.execution.quiet import quiet_lightning
from lightning_dtda.recording.configuration import circumstances, current_hyperparameters
from lightning_dtda.replay import Eager
from lightning_dtda.replay.replica import Replica
from lightning_dtda.replay.stand_ins import Time
from lightning_dtda.retraining.engine import Engine, Outcome, Retraining
from lightning_dtda.retraining.task import Task
from lightning_dtda.trajectory import ParameterLayout
from lightning_dtda.trajectory.storage import is_disk_full
from lightning_dtda.units import human_seconds

_log = logging.getLogger(__name__)


class TrainerEngine(Engine):
    """Runs the Trainer once for each training.

    Args:
        workers: Where to train. Each training is sent on its own, so nothing else is lost with a worker: on a Ray
            cluster that costs 3 ms, and Lightning takes 50 ms for a fit of seven steps.
    """

    name: ClassVar[str] = "trainer"

    def __init__(self, workers: Workers) -> None:
        self.workers = workers

    @override
    def train(self, retraining: Retraining, tasks: Sequence[Task]) -> Iterator[list[Outcome]]:
        started = time.perf_counter()
        outcomes = self.workers.run(functools.partial(train_one, retraining), tasks)
        for number, (task, outcome) in enumerate(outcomes):
            if number == 0 and len(tasks) > 1:
                rounds = (len(tasks) - 1) / max(1, self.workers.places())
                seconds = (time.perf_counter() - started) * rounds
                _log.info("About %s remaining for the other %d trainings.", human_seconds(seconds), len(tasks) - 1)
            yield [Outcome(task, None, outcome.reason) if isinstance(outcome, Lost) else outcome]


def train_one(
    retraining: Retraining,
    task: Task,
    callbacks: Sequence[pl.Callback] = (),
    reraised: tuple[type[Exception], ...] = (),
) -> Outcome:
    """Train once and measure; errors become part of the outcome.

    Args:
        retraining: What to train and measure.
        task: The training.
        callbacks: Callbacks to add to those of the Trainer.
        reraised: Types of errors that the callbacks raise and that are not failures of the training.

    Raises:
        RetrainingError: If the disk is full.
    """
    assert retraining.recipe is not None
    try:
        with quiet_lightning():
            removed = retraining.removed_in(task)
            trainer, module = retraining.recipe.fit(task.seed, removed, retraining.data, callbacks)
        return Outcome.of(task, measure_module(retraining, trainer, module))
    except reraised:
        raise
    except Exception as error:  # any error in the user's code
        if is_disk_full(error):
            raise RetrainingError(
                f"The disk became full while a model was trained ({error}). Free some space, then call again."
            ) from error
        if not isinstance(error, DTDAError):
            traceback.print_exc()
        return Outcome(task, None, f"{type(error).__name__}: {error}")


def measure_module(retraining: Retraining, trainer: pl.Trainer, module: pl.LightningModule) -> Tensor:
    """Measure a trained module in evaluation mode ``(queries,)``.

    Raises:
        AttributionError: If the measurement does not return one number per query.
    """
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    like = next(iter(trained.values()))
    trained = {name: parameter for name, parameter in trained.items() if parameter.dtype == like.dtype}
    shapes = tuple(tuple(parameter.shape) for parameter in trained.values())
    layout = ParameterLayout(tuple(trained), shapes, (len(trained),))
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    replica = Replica(module, layout, circumstances(trainer, module), like.dtype, module.device, datamodule=datamodule)
    # the Trainer has already counted its last epoch
    epoch, optimizers = max(trainer.current_epoch - 1, 0), trainer.optimizers[:1]
    settings = [group for optimizer in optimizers for group in current_hyperparameters(optimizer)]
    time = Time(epoch, trainer.global_step, 0, settings)
    return retraining.measure(Eager(replica), layout.flatten(trained.values())[None], {}, time)[0]
