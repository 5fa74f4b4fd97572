"""A copy of the user's module that trains nothing, logs nothing and remembers nothing."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor
from torchmetrics import Metric

from lightning_dtda.errors import ReplayError


class ReplayTrainer:
    """Stands in for the Trainer in a replayed ``training_step``: the clock, and loggers that drop everything.

    Args:
        current_epoch: As at the recorded step.
        global_step: As at the recorded step.
    """

    def __init__(self, current_epoch: int = 0, global_step: int = 0) -> None:
        self.current_epoch = current_epoch
        self.global_step = global_step
        self.training = True
        self.is_global_zero = True
        self.global_rank = self.local_rank = 0
        self.world_size = self.num_nodes = 1
        self.logger = DummyLogger()
        self.loggers = [self.logger]

    def __getattr__(self, name: str) -> Any:
        raise ReplayError(
            f"training_step reads self.trainer.{name}, which a replay does not have (it has current_epoch and "
            "global_step). Keep what the loss depends on in the module or its batches."
        )


def silent_copy(module: LightningModule, evaluation_modules: Sequence[str] = ()) -> LightningModule:
    """Return a copy of a module, in training mode, whose hooks to the Trainer, loggers and metrics do nothing.

    ``training_step`` may call ``self.log``, read ``self.trainer.current_epoch`` and update torchmetrics; none of it
    may fail outside a Trainer, fail under ``vmap``, or leave a trace in the user's module.

    Args:
        module: The user's module; it is not changed, even while a Trainer is fitting it.
        evaluation_modules: Names of the submodules that were in evaluation mode during training.

    Raises:
        ReplayError: If the module cannot be copied.
    """
    try:
        silent = copy.deepcopy(module)
    except Exception as error:
        raise ReplayError(
            f"{type(module).__name__} cannot be copied ({error}). Keep what has no copy (locks, open files, "
            "generators) out of the module, or define __deepcopy__."
        ) from error
    silent.train()
    for name in evaluation_modules:
        silent.get_submodule(name).eval()
    for name in ("log", "log_dict", "print"):
        setattr(silent, name, _nothing)
    silent._trainer = ReplayTrainer()  # type: ignore[assignment]
    for submodule in silent.modules():
        if isinstance(submodule, Metric):
            _silence_metric(submodule)
    return silent


def _silence_metric(metric: Metric) -> None:
    for name in ("forward", "update", "compute"):
        setattr(metric, name, _zero)
    metric.reset = _nothing  # type: ignore[method-assign]


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _zero(*args: Any, **kwargs: Any) -> Tensor:
    return torch.zeros(())
