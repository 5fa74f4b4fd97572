"""The first steps of a training, recorded to see what all of it takes."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint
from typing_extensions import override

from lightning_dtda.errors import RecordingError
from lightning_dtda.planning.forecast import Cost
from lightning_dtda.recording import TrajectoryRecorder
from lightning_dtda.recording.extent import checkpoint_interval
from lightning_dtda.trajectory import Run
from lightning_dtda.trajectory.prolonged import ProlongedRun

_FEWEST_STEPS, _WARM_UP = 10, 2
"""Steps that are taken at the least, if the training has so many, and those of them that are not timed."""


@dataclass(frozen=True)
class FirstSteps:
    """What was recorded of a training, and what all of it is like.

    Args:
        run: The record.
        steps: T, of all of the training.
        interval: Steps between two checkpoints.
        recording: What one run takes.
    """

    run: Run
    steps: int
    interval: int
    recording: Cost

    def of_length(self, steps: int) -> FirstSteps:
        """Return the same of a training of so many steps."""
        return replace(self, steps=steps, recording=self.recording.times(steps / self.steps))

    def prolonged(self, examples: int) -> ProlongedRun:
        """Return a run of all steps, trained on so many examples."""
        return ProlongedRun(self.run, self.steps, min(self.interval, self.steps), examples)


def record_first_steps(
    trainer: pl.Trainer, module: pl.LightningModule, data: Any, recorder: TrajectoryRecorder, seconds: float
) -> FirstSteps:
    """Train for some seconds, record it, and say what the whole training takes.

    Callbacks that write checkpoints are left out.

    Args:
        trainer: The Trainer; it has taken these steps afterwards.
        module: The module.
        data: What is trained on.
        recorder: Records the run.
        seconds: For how long; at least ten steps are taken.

    Raises:
        RecordingError: If the training cannot be recorded, is one of several processes, or has no known length.
    """
    if trainer.world_size > 1:
        raise RecordingError(
            f"The Trainer has {trainer.world_size} processes; a plan is made in one. Set trainer.devices to 1: each "
            "device takes about as long as that one with its share of the examples."
        )
    recorder.runs_to_fit = 0  # whether the disk holds them is for the plan to say
    watch = _Stopwatch(seconds)
    kept = [callback for callback in trainer.callbacks if not isinstance(callback, Checkpoint)]  # type: ignore[attr-defined]
    trainer.callbacks = [*kept, recorder, watch]  # type: ignore[attr-defined]
    started = time.perf_counter()
    if isinstance(data, pl.LightningDataModule):
        trainer.fit(module, datamodule=data)
    else:
        trainer.fit(module, None if data is module else data)
    (path,) = recorder.root.iterdir()
    run = Run(path)
    if trainer.interrupted:
        raise KeyboardInterrupt
    steps = run.steps if watch.at_end else run.manifest.planned_steps
    if steps is None:
        raise RecordingError(
            "How many steps the Trainer will take is not known. Give it max_steps, or max_epochs in place of max_time."
        )
    assert recorder.needed is not None
    interval = checkpoint_interval(recorder.checkpoint_every, run.manifest.planned_steps)
    of_one = Cost(watch.seconds(started, steps, trainer), recorder.needed.memory, recorder.needed.disk)
    return FirstSteps(run, steps, interval, of_one)


class _Stopwatch(Callback):
    """Times the steps of a training and its batches of validation, and ends it after some seconds.

    Args:
        seconds: How many.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._ends: list[float] = []  # of steps, less the time of validation before
        self._validation = 0.0
        self._batches: list[float] = []  # seconds of batches of validation
        self._began = 0.0
        self.at_end = True

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, *rest: Any) -> None:
        if trainer.global_step == len(self._ends):  # gradients are accumulated still
            return
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize(trainer.strategy.root_device)
        self._ends.append(time.perf_counter() - self._validation)
        timed = len(self._ends) - _WARM_UP
        if timed + _WARM_UP >= _FEWEST_STEPS and self._ends[-1] - self._ends[_WARM_UP - 1] >= self._seconds:
            self.at_end = False
            # not should_stop, which would pass the whole validation set first
            trainer.fit_loop.epoch_loop.max_steps = trainer.global_step

    @override
    def on_validation_start(self, *rest: Any) -> None:
        self._began = time.perf_counter()

    @override
    def on_validation_end(self, *rest: Any) -> None:
        self._validation += time.perf_counter() - self._began

    @override
    def on_validation_batch_start(self, *rest: Any) -> None:
        self._batches.append(-time.perf_counter())

    @override
    def on_validation_batch_end(self, *rest: Any) -> None:
        self._batches[-1] += time.perf_counter()

    def seconds(self, started: float, steps: int, trainer: pl.Trainer) -> float:
        """Return what the whole training takes.

        Args:
            started: When it did.
            steps: T.
            trainer: The Trainer.
        """
        warm = min(_WARM_UP, len(self._ends) - 1)
        before, timed = self._ends[warm] - started, len(self._ends) - 1 - warm
        of_steps = (self._ends[-1] - self._ends[warm]) / timed * (steps - 1 - warm) if timed else 0.0
        if not self._batches:
            return before + of_steps
        of_batch = min(self._batches) if len(self._batches) < 3 else sum(self._batches[1:]) / (len(self._batches) - 1)
        return before + of_steps + of_batch * _validation_batches(trainer, steps)


def _validation_batches(trainer: pl.Trainer, steps: int) -> float:
    """Return how many batches of validation a training of T steps passes."""
    batches = sum(trainer.num_val_batches)
    in_epoch = float(trainer.num_training_batches)
    trained = steps * trainer.accumulate_grad_batches
    every = min(float(trainer.val_check_batch or math.inf), in_epoch)
    if trainer.check_val_every_n_epoch is None:
        return batches * (trained // float(trainer.val_check_batch or math.inf))
    epochs = math.ceil(trained / in_epoch) // trainer.check_val_every_n_epoch
    return batches * epochs * (in_epoch // every)
