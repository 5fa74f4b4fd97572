"""Recording of a running training: its steps are collected and handed to the writer."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_dtda.errors import RecordingError
from lightning_dtda.recording import checks
from lightning_dtda.recording.averaging import Average
from lightning_dtda.recording.shard_buffer import ShardBuffer
from lightning_dtda.recording.step_watch import StepWatch, TakenStep
from lightning_dtda.replay.replica import buffers
from lightning_dtda.trajectory import Manifest, RunWriter


class RunRecording:
    """The recording of one run: watches the steps of a training and hands them to the writer.

    Args:
        module: The module.
        optimizer: Optimizer of the module.
        writer: Writer of the run, or of the part that this process sees.
        manifest: Manifest of the run, with the steps that were recorded before.
        interval: Number of steps between checkpoints; ``None`` if another process writes them.
    """

    def __init__(
        self,
        module: pl.LightningModule,
        optimizer: Optimizer,
        writer: RunWriter,
        manifest: Manifest,
        interval: int | None,
    ) -> None:
        self.layout = manifest.layout
        self._module = module
        self._writer = writer
        gradients = None if manifest.gradients == "none" else getattr(torch, manifest.gradients)
        self._buffer = ShardBuffer(self.layout, gradients, module.device, manifest.steps)
        self._interval = interval
        self._watch = StepWatch(
            module=module,
            optimizer=optimizer,
            layout=self.layout,
            hyperparameter_names=manifest.hyperparameters,
            applying=self._buffer.put_gradient,
            taken=self._after_step,
            steps=manifest.steps,
        )
        self.begin_micro_batch = self._watch.begin_micro_batch
        self.add_micro_batch = self._watch.add_micro_batch
        self.drop_pending = self._watch.drop_pending
        self._last_checkpoint = self.steps
        if interval is not None and all(entry["step"] != self.steps for entry in manifest.checkpoints):
            self._checkpoint()

    @property
    def steps(self) -> int:
        """Number of steps taken so far."""
        return self._watch.steps

    def before_clipping(self) -> None:
        """Note the gradient's norm, which is lost when the gradient is clipped."""
        if (gradients := self._watch.gradients) is not None:
            self._buffer.put_norm(gradients)

    def sync(self) -> None:
        """Wait until every step so far is on disk."""
        self._flush()
        self._writer.sync()

    def add_average(self, average: Average) -> None:
        """Add the averaged parameters that the training ends with instead of its last ones."""
        self._writer.add_average(average.facts, average.tensors)

    def add_metrics(self, metrics: Mapping[str, Tensor]) -> None:
        """Add the metrics that the training ends with, as far as they are finite: JSON has no other numbers."""
        self._writer.add_metrics({name: value.item() for name, value in metrics.items() if value.isfinite()})

    def close(self, status: Literal["complete", "incomplete"], reason: str | None) -> None:
        """Write the remaining records and close the run; a run that stops before its first step is deleted."""
        self._watch.close()
        if status == "incomplete" and self.steps == 0:
            self._writer.discard()
            return
        try:
            if self._interval is not None and status == "complete" and self._last_checkpoint != self.steps:
                self._checkpoint()
            else:  # perhaps stopped within a step: write complete steps only, and no parameters from within a step
                self._flush()
        finally:
            self._writer.close(status, reason)

    def _after_step(self, step: TakenStep) -> None:
        self._buffer.append(step)
        if self._interval is not None and self.steps % self._interval == 0:
            self._checkpoint()
        elif self._buffer.is_full:
            self._flush()

    def _flush(self) -> None:
        if len(self._buffer):
            self._writer.add_shard(*self._buffer.take())

    def _checkpoint(self) -> None:
        self._flush()
        changing = {
            f"parameters.{name}": parameter
            for name, parameter in zip(self.layout.names, self._watch.parameters, strict=True)
        } | {f"buffers.{name}": buffer for name, buffer in buffers(self._module, self.layout, self.steps).items()}
        # copy now: the next step changes the parameters in place
        tensors = {name: tensor.detach().to("cpu", copy=True) for name, tensor in changing.items()}
        for number, state in enumerate(self._watch.states()):  # these are copies
            tensors |= {f"state.{number}.{key}": part.cpu() for key, part in state.items()}
        self._writer.add_checkpoint(self.steps, tensors)
        self._last_checkpoint = self.steps


def make_directory(directory: Path, overwrite: bool) -> None:
    """Create an empty run directory.

    Args:
        directory: Directory to create.
        overwrite: Whether to replace an existing run.

    Raises:
        RecordingError: If the directory exists and may not be replaced, or cannot be created.
    """
    # check again: another process may have started the same run in the meantime
    checks.refuse_existing(directory, overwrite)
    try:
        if directory.exists():
            shutil.rmtree(directory)
        directory.mkdir(parents=True)
    except OSError as error:
        raise RecordingError(f"{directory} cannot be written to ({error}). Choose another root.") from error
