"""A check, before the first training, for settings that make trainings differ in their steps."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EarlyStopping, Timer
from typing_extensions import override

from lightning_dtda.errors import CannotStackError


class Watch(pl.Callback):
    """Checks a Trainer that is about to train, and refuses settings that make trainings differ in their steps."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        """Device of the Trainer."""

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.device = trainer.strategy.root_device
        if trainer.precision not in ("32-true", "64-true"):
            raise CannotStackError(f"the Trainer has precision={trainer.precision!r}")
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, EarlyStopping):
                raise CannotStackError("EarlyStopping ends each training at a different step")
            if isinstance(callback, Timer):
                raise CannotStackError("a time limit (max_time, Timer) ends each training at a different step")
        if any(config.reduce_on_plateau for config in trainer.lr_scheduler_configs):
            raise CannotStackError("ReduceLROnPlateau gives each training different learning rates")
