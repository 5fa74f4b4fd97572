"""Recording the first steps of a training, to estimate the cost of the whole training."""

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
from lightning_dtda.execution.fitting import fit
from lightning_dtda.planning.forecast import Cost
from lightning_dtda.recording import TrajectoryRecorder
from lightning_dtda.recording.extent import checkpoint_interval
from lightning_dtda.trajectory import Run
from lightning_dtda.trajectory.prolonged import ProlongedRun

_FEWEST_STEPS, _WARM_UP = 10, 2
"""Minimum number of steps to take (unless the training is shorter), and number of initial steps that are not timed."""


@dataclass(frozen=True)
class FirstSteps:
    """The recorded first steps of a training, and the length and cost of the whole training.

    Args:
        run: Record of the first steps.
        steps: T, the number of steps of the whole training.
        interval: Number of steps between checkpoints.
        recording: Cost of recording one whole run.
    """

    run: Run
    steps: int
    interval: int
    recording: Cost

    def of_length(self, steps: int) -> FirstSteps:
        """Return the same for a training with another number of steps."""
        return replace(self, steps=steps, recording=self.recording.times(steps / self.steps))

    def prolonged(self, examples: int) -> ProlongedRun:
        """Return a run with all steps, trained on the given number of examples."""
        return ProlongedRun(self.run, self.steps, min(self.interval, self.steps), examples)


def record_first_steps(
    trainer: pl.Trainer, module: pl.LightningModule, data: Any, recorder: TrajectoryRecorder, seconds: float
) -> FirstSteps:
    """Train and record for a few seconds, and return the estimated cost of the whole training.

    Callbacks that write checkpoints are left out.

    Args:
        trainer: The Trainer, which is used up.
        module: The module, which is trained.
        data: Training data.
        recorder: Recorder of the run.
        seconds: Duration in seconds; at least ten steps are taken.

    Raises:
        RecordingError: If the training cannot be recorded, uses several processes, or has an unknown length.
    """
    if trainer.world_size > 1:
        raise RecordingError(
            f"The Trainer has {trainer.world_size} processes, but planning needs one. Set trainer.devices to 1: each "
            "of several devices takes about as long as this one does for its share of the examples."
        )
    recorder.runs_to_fit = 0  # the plan, not the recorder, checks the disk space
    watch = _Stopwatch(seconds)
    kept = [callback for callback in trainer.callbacks if not isinstance(callback, Checkpoint)]  # type: ignore[attr-defined]
    trainer.callbacks = [*kept, recorder, watch]  # type: ignore[attr-defined]
    started = time.perf_counter()
    fit(trainer, module, None if data is module else data)
    (path,) = recorder.root.iterdir()
    run = Run(path)
    steps = run.steps if watch.at_end else run.manifest.planned_steps
    if steps is None:
        raise RecordingError(
            "The number of steps that the Trainer will take is unknown. Set max_steps, or max_epochs instead of "
            "max_time."
        )
    assert recorder.needed is not None
    interval = checkpoint_interval(recorder.checkpoint_every, run.manifest.planned_steps)
    of_one = Cost(watch.seconds(started, steps, trainer), recorder.needed.memory, recorder.needed.disk)
    return FirstSteps(run, steps, interval, of_one)


class _Stopwatch(Callback):
    """Times the training steps and validation batches of a training, and ends it after some seconds.

    Args:
        seconds: Duration in seconds.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._ends: list[float] = []  # of steps, minus the time of validation before
        self._validation = 0.0
        self._batches: list[float] = []  # durations of validation batches in seconds
        self._began = 0.0
        self.at_end = True

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, *rest: Any) -> None:
        if trainer.global_step == len(self._ends):  # gradients are still being accumulated
            return
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize(trainer.strategy.root_device)
        self._ends.append(time.perf_counter() - self._validation)
        timed = len(self._ends) - _WARM_UP
        if timed + _WARM_UP >= _FEWEST_STEPS and self._ends[-1] - self._ends[_WARM_UP - 1] >= self._seconds:
            self.at_end = False
            # not should_stop, which would first run the whole validation
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
        """Return the estimated duration of the whole training in seconds.

        Args:
            started: Time when the training started.
            steps: T, the number of steps of the whole training.
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
    """Return the number of validation batches in a training of T steps."""
    batches = sum(trainer.num_val_batches)
    in_epoch = float(trainer.num_training_batches)
    trained = steps * trainer.accumulate_grad_batches
    every = min(float(trainer.val_check_batch or math.inf), in_epoch)
    if trainer.check_val_every_n_epoch is None:
        return batches * (trained // float(trainer.val_check_batch or math.inf))
    epochs = math.ceil(trained / in_epoch) // trainer.check_val_every_n_epoch
    return batches * epochs * (in_epoch // every)
