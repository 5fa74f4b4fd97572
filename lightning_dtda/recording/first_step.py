"""The first step of a training, to compare with the training of another seed."""

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
from lightning_dtda.trajectory import Run

_RUN = "first-step"

Fit = Callable[[Callable[[pl.Trainer], pl.Trainer]], object]
"""Trains, by a Trainer that it has prepared by its argument before."""


@contextmanager
def first_step_of(seed: int, fit: Fit) -> Iterator[Run]:
    """Let the Trainer take a training's first step.

    Args:
        seed: Of the training.
        fit: Sets it and trains.

    Returns:
        The record of this step, for as long as the context lasts.

    Raises:
        CannotStackError: If the training fails before.
    """
    with tempfile.TemporaryDirectory() as directory:
        recorder = TrajectoryRecorder(directory, run=_RUN, gradients="none")
        recorder.runs_to_fit = 0  # nor does the disk have to hold all of it

        def prepared(trainer: pl.Trainer) -> pl.Trainer:
            trainer.loggers = [DummyLogger()]  # it is no training of which to keep a log
            trainer.callbacks.extend([recorder, _OneStep()])  # type: ignore[attr-defined]
            return trainer

        try:
            fit(prepared)
        except _OneStepTaken:
            pass
        except Exception as error:  # whatever the user's code does
            raise CannotStackError(f"the training of seed {seed} fails at its start ({error!r})") from error
        yield Run(Path(directory) / _RUN)


class _OneStepTaken(Exception):  # noqa: N818 - nothing went wrong
    """Ends a training of which only the first step was wanted."""


class _OneStep(pl.Callback):
    """Ends a training after its first step."""

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if trainer.global_step:
            raise _OneStepTaken
