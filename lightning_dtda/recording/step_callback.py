"""Base class of the recorder and the response tracker, which follow each step of a training."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_dtda.recording import checks
from lightning_dtda.recording.batch_tap import BatchTap
from lightning_dtda.recording.data import TrainingData
from lightning_dtda.recording.response_tracking import ResponseTracking
from lightning_dtda.recording.run_recording import RunRecording
from lightning_dtda.trajectory import MicroBatch


class StepCallback(Callback):
    """Finds out what each step of a training consists of, and passes this to a follower."""

    _data: TrainingData

    def __init__(self) -> None:
        self._tap: BatchTap | None = None
        self._follower: RunRecording | ResponseTracking | None = None
        self._resumed: dict[str, Any] | None = None

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._tap is not None:
            self._data.refuse_change(self._tap.loader, trainer.current_epoch)

    @override
    def on_before_zero_grad(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer) -> None:
        if self._follower is not None:
            self._follower.drop_pending()

    @override
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        if self._follower is not None:
            self._follower.add_micro_batch()

    def _optimizer(self, trainer: pl.Trainer) -> Optimizer:
        """Return the optimizer of the training, or raise an error if its steps cannot be followed."""
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        return checks.refuse_optimizers(trainer.optimizers, scaled, self._resumed is not None)

    def _take_batch(self, trainer: pl.Trainer, batch_idx: int) -> tuple[MicroBatch, Any]:
        """Return the description of the current batch, and the batch as it was collated."""
        assert self._tap is not None
        indices = self._tap.current_indices()
        states, collated = self._tap.take()
        self._data.check_indices(indices)
        step = trainer.global_step
        return MicroBatch(torch.tensor(indices), trainer.current_epoch, batch_idx, states, global_step=step), collated

    def _release(self) -> None:
        """Restore the Trainer."""
        if self._tap is not None:
            self._tap.remove()
            self._tap = None
        self._resumed = None
