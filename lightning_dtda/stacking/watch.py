"""What makes trainings differ in their steps is refused before the first one is trained."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EarlyStopping, Timer
from typing_extensions import override

from lightning_dtda.errors import CannotStackError


class Watch(pl.Callback):
    """Looks at a Trainer that is about to train, and refuses what makes trainings differ in their steps."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        """Where the Trainer trains."""

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.device = trainer.strategy.root_device
        if trainer.precision not in ("32-true", "64-true"):
            raise CannotStackError(f"the Trainer has precision={trainer.precision!r}")
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, EarlyStopping):
                raise CannotStackError("EarlyStopping ends each training at another step")
            if isinstance(callback, Timer):
                raise CannotStackError("a limit of time (max_time, Timer) ends each training at another step")
        if any(config.reduce_on_plateau for config in trainer.lr_scheduler_configs):
            raise CannotStackError("ReduceLROnPlateau gives each training other learning rates")
