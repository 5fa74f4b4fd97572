"""Settings that all runs of an ensemble must share, as JSON, to be samples of the same distribution."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from enum import Enum
from numbers import Number
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lightning_dtda.compatibility import overrides
from lightning_dtda.replay.kernels import enabled_kernels
from lightning_dtda.replay.stand_ins import Circumstances
from lightning_dtda.version import __version__

_NOT_SETTINGS = frozenset({"params", "initial_lr", "foreach", "fused", "capturable", "differentiable"})
"""Entries of a parameter group that do not affect the update; ``initial_lr`` belongs to the scheduler."""


def configuration(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    loader: DataLoader[Any],
    data: dict[str, Any],
    optimizer: Optimizer,
    seed: int | None,
) -> dict[str, Any]:
    """Describe module, data, optimizer and training, which must be the same for all runs of an ensemble.

    Args:
        trainer: The Trainer.
        module: The module.
        loader: The training DataLoader.
        data: Description of its data set.
        optimizer: The optimizer.
        seed: Seed of the run; this may differ between runs.
    """
    names, _ = hyperparameters(optimizer)
    return {
        "module": module_configuration(module, seed),
        "dataset": data,
        # at the first step; later changes by a scheduler are recorded step by step
        "hyperparameters": {
            name: [values[number] for values in hyperparameter_values(optimizer, names)]
            for number, name in enumerate(names)
        },
        "training": training_configuration(trainer, loader),
    }


_TRAINER_FACTS = (
    "max_epochs",
    "min_epochs",
    "max_steps",
    "min_steps",
    "estimated_stepping_batches",
    "num_training_batches",
    "accumulate_grad_batches",
    "gradient_clip_val",
    "log_every_n_steps",
    "world_size",
    "num_nodes",
    "num_devices",
    "precision",
)
"""Attributes of the Trainer that ``training_step`` may read; a replay takes them from the record."""


def circumstances(trainer: pl.Trainer, module: pl.LightningModule) -> Circumstances:
    """Describe what ``training_step`` may depend on besides the batch, the parameters and the time."""
    facts = {name: as_json(getattr(trainer, name)) for name in _TRAINER_FACTS}
    data = trainer.datamodule  # type: ignore[attr-defined]
    hooks = {}
    for name in ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer"):
        if data is not None and overrides(data, name):
            hooks[name] = "datamodule"
        elif overrides(module, name):
            hooks[name] = "module"
    return Circumstances(
        precision=str(trainer.precision),
        trainer={name: fact for name, fact in facts.items() if fact is not None and fact != math.inf},
        evaluation_modules=[name for name, layer in module.named_modules() if name and not layer.training],
        transfer_hooks=hooks,
        kernels=enabled_kernels(),
    )


def current_hyperparameters(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return the current settings of each parameter group, by torch's names."""
    names, options = hyperparameters(optimizer)
    return [
        dict(zip(names, values, strict=True)) | others
        for values, others in zip(hyperparameter_values(optimizer, names), options, strict=True)
    ]


def module_configuration(module: pl.LightningModule, seed: int | None = None) -> dict[str, Any]:
    """Describe a module by its class, its architecture and its hyperparameters except the seed."""
    return {
        "class": class_path(type(module)),
        "architecture": hashlib.sha256(repr(module).encode()).hexdigest()[:16],
        "hyperparameters": as_json(
            {
                key: value
                for key, value in module.hparams.items()
                # LightningCLI adds _class_path and _instantiator, which tell how the module was created, not what it is
                if not key.startswith("_") and not (key == "seed" and value == seed)
            }
        ),
    }


def training_configuration(trainer: pl.Trainer, loader: DataLoader[Any]) -> dict[str, Any]:
    """Describe the length, the batches and the precision of the training."""
    return {
        "batch_size": getattr(loader.batch_sampler, "batch_size", None),
        "drop_last": getattr(loader.batch_sampler, "drop_last", None),
        "sampler": class_path(type(loader.sampler)),
        "max_epochs": trainer.max_epochs,
        "max_steps": trainer.max_steps,
        "limit_train_batches": trainer.limit_train_batches,
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "gradient_clip_val": trainer.gradient_clip_val,
        "gradient_clip_algorithm": trainer.gradient_clip_algorithm and str(trainer.gradient_clip_algorithm.value),
        "precision": trainer.precision,
    }


def hyperparameters(optimizer: Optimizer) -> tuple[list[str], list[dict[str, Any]]]:
    """Split the settings of the parameter groups into the names of the numbers, and each group's other settings."""
    groups = [_flat(group) for group in optimizer.param_groups]
    # a group may have additional entries, such as the user's notes
    numbers = [name for name in groups[0] if all(is_number(group.get(name)) for group in groups)]
    options = [{name: as_json(value) for name, value in group.items() if name not in numbers} for group in groups]
    return numbers, options


def hyperparameter_values(optimizer: Optimizer, names: list[str]) -> list[list[float]]:
    """Return the current numbers of each parameter group, in the order of ``names``."""
    return [[float(settings[name]) for name in names] for settings in map(_flat, optimizer.param_groups)]


def _flat(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a parameter group, with tuples (Adam's betas) split into one entry per element."""
    settings: dict[str, Any] = {}
    for name, value in group.items():
        if name in _NOT_SETTINGS:
            continue
        if isinstance(value, tuple):
            settings |= {f"{name}.{position}": part for position, part in enumerate(value)}
        else:
            settings[name] = value
    return settings


def is_number(value: Any) -> bool:
    """Return whether a setting is recorded at every step: a number, or a tensor with one number."""
    return (isinstance(value, Number) and not isinstance(value, bool)) or isinstance(value, torch.Tensor)


def as_json(value: Any) -> Any:
    """Return a JSON value; for unsupported types the class, since a repr may contain addresses that change."""
    if isinstance(value, Enum):
        return as_json(value.value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    return class_path(value if isinstance(value, type) else type(value))


def class_path(cls: type) -> str:
    """Return the import path of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def versions() -> dict[str, str]:
    """Return the installed versions of torch, lightning and lightning-dtda."""
    return {"torch": torch.__version__, "lightning": pl.__version__, "lightning-dtda": __version__}
