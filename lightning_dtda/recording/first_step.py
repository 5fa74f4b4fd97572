"""The first step of a training, for comparison with the training of another seed."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers.logger import DummyLogger
from typing_extensions import override

from lightning_dtda.errors import CannotStackError
from lightning_dtda.recording import TrajectoryRecorder
from lightning_dtda.recording.crossed_seeds import RunSeeds
from lightning_dtda.trajectory import Run

_RUN = "first-step"

Fit = Callable[[Callable[[pl.Trainer], pl.Trainer]], object]
"""Function that trains, with a Trainer that it first passes through its argument."""


@contextmanager
def first_step_of(seed: int, fit: Fit, seeds: RunSeeds | None = None) -> Iterator[Run]:
    """Let the Trainer take the first step of a training.

    Args:
        seed: Seed of the training.
        fit: Function that sets the seed and trains.
        seeds: Seeds of the sources of randomness, if they are set apart.

    Returns:
        Record of this step, which exists as long as the context.

    Raises:
        CannotStackError: If the training fails before the end of the step.
    """
    with tempfile.TemporaryDirectory() as directory:
        recorder = TrajectoryRecorder(directory, run=_RUN, gradients="none")
        recorder.seeds = seeds
        recorder.runs_to_fit = 0  # the disk need not have space for the whole run

        def prepared(trainer: pl.Trainer) -> pl.Trainer:
            trainer.loggers = [DummyLogger()]  # do not log this training
            trainer.callbacks.extend([recorder, _OneStep()])  # type: ignore[attr-defined]
            return trainer

        try:
            fit(prepared)
        except _OneStepTaken:
            pass
        except Exception as error:  # any error in the user's code
            raise CannotStackError(f"the training with seed {seed} fails at the start ({error!r})") from error
        yield Run(Path(directory) / _RUN)


class _OneStepTaken(Exception):  # noqa: N818 - nothing went wrong
    """Ends a training after its first step."""


class _OneStep(pl.Callback):
    """Ends a training after its first step."""

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if trainer.global_step:
            raise _OneStepTaken
