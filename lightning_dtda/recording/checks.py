"""Checks that refuse what cannot be recorded before the first step; the messages say what to do."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_dtda.compatibility import InstanceNorm, changes_gradients, is_a, kinds, overrides, unscales_gradients
from lightning_dtda.errors import RecordingError
from lightning_dtda.optimizers import NO_DERIVATIVE, UPDATES
from lightning_dtda.recording.configuration import class_path, current_hyperparameters
from lightning_dtda.trajectory import ParameterLayout, is_being_written
from lightning_dtda.trajectory.manifest import MANIFEST

_PRECISIONS = ("plugins.precision.Precision", "plugins.precision.DoublePrecision", "plugins.precision.MixedPrecision")
_SHARDED = ("strategies.ModelParallelStrategy", "strategies.FSDPStrategy", "strategies.DeepSpeedStrategy")
_STEP_HOOKS = ("backward", "configure_gradient_clipping")


def refuse_trainer(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Refuse unsupported settings that are known before data are loaded.

    Raises:
        RecordingError: If a setting is not supported; the message names it and says what to do.
    """
    if not module.automatic_optimization:
        raise RecordingError(
            f"{type(module).__name__} uses manual optimization, so its steps need not follow one loss. Use automatic "
            "optimization, or train without the recorder."
        )
    refuse_strategy(trainer.strategy)
    plugin = trainer.precision_plugin
    if type(plugin) not in kinds(*_PRECISIONS):
        raise RecordingError(
            f"precision={plugin.precision!r} cannot be replayed. Set Trainer(precision=...) to "
            '"32-true", "64-true", "bf16-mixed" or "16-mixed".'
        )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if is_a(callback, "callbacks.BaseFinetuning"):
            raise RecordingError(
                f"{type(callback).__name__} changes during training which parameters are trained, but recording needs "
                "the same ones at every step. Remove it from the Trainer, or record each phase as a separate training."
            )
    for hook in _STEP_HOOKS:
        if overrides(module, hook):
            raise RecordingError(
                f"{type(module).__name__}.{hook} changes how a step is taken, which a replay cannot reproduce. Remove "
                "it, or train without the recorder."
            )


def refuse_strategy(strategy: Strategy) -> None:
    """Refuse strategies in which no process sees the gradient that is applied.

    Raises:
        RecordingError: If the strategy is not supported; the message says why, and which ones are.
    """
    if is_a(strategy, "strategies.SingleDeviceStrategy"):
        return
    # subclasses change how gradients are reduced
    if type(strategy) not in kinds("strategies.DDPStrategy"):
        why = (
            "spreads parameters, gradients and the optimizer's state over processes, so no process has all those of "
            "a step"
            if isinstance(strategy, kinds(*_SHARDED))
            else "is not known to apply the mean of the processes' gradients"
        )
        raise RecordingError(
            f'The strategy {type(strategy).__name__} {why}. Train with strategy="ddp", or on one device: '
            'Trainer(devices=1, strategy="auto").'
        )
    if changes_gradients(strategy):
        raise RecordingError(
            "The DDPStrategy has a communication hook or averages models, so the applied gradient is not the mean of "
            "the processes' gradients. Leave out ddp_comm_hook and model_averaging_period."
        )


def refuse_layers(module: nn.Module) -> None:
    """Refuse layers whose state a replay cannot reproduce, and layers with sparse gradients.

    Raises:
        RecordingError: If there is such a layer; the message names the first one.
    """
    for name, layer in module.named_modules():
        if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)) and layer.sparse:
            raise RecordingError(f"The gradients of layer {name} are sparse. Use dense gradients (sparse=False).")
        if isinstance(layer, nn.SyncBatchNorm) and layer.training:
            raise RecordingError(
                f"Layer {name} computes its statistics over all processes, which a replay cannot reproduce. Use the "
                "statistics of each process: Trainer(sync_batchnorm=False)."
            )
        if isinstance(layer, InstanceNorm) and layer.training and layer.track_running_stats:
            raise RecordingError(
                f"Layer {name} keeps running statistics, which a replay cannot follow. Set track_running_stats=False."
            )


def refuse_optimizers(optimizers: list[Optimizer], scaled: bool = False, resumed: bool = False) -> Optimizer:
    """Return the training's only optimizer.

    Args:
        optimizers: Optimizers of the Trainer.
        scaled: Whether a gradient scaler is used.
        resumed: Whether the training continues after recorded steps.

    Raises:
        RecordingError: If there are several optimizers, or it is not supported, was used before or hides its gradients.
    """
    if len(optimizers) != 1:
        raise RecordingError(
            f"The training has {len(optimizers)} optimizers, but recording needs exactly one. Return a single one from "
            "configure_optimizers; it may have several parameter groups."
        )
    optimizer = optimizers[0]
    # LightningOptimizer and schedulers wrap instances, never the class: the exact class determines the step
    if (path := optimizer_path(optimizer)) not in UPDATES:
        names = sorted(known.rsplit(".", 1)[1] for known in UPDATES)
        supported = [name for name in names if hasattr(torch.optim, name)]
        remedy = f"Train with one of these optimizers in torch.optim: {', '.join(supported)}"
        if (why := NO_DERIVATIVE.get(type(optimizer).__name__)) is not None:
            raise RecordingError(f"The optimizer {path} cannot be followed: {why}. {remedy}.")
        raise RecordingError(
            f"The optimizer {path} is unknown, so its steps cannot be differentiated. {remedy}; or define its update: "
            f'lightning_dtda.optimizers.UPDATES["{path}"] = ... (see "Other optimizers" in the documentation).'
        )
    if scaled and unscales_gradients(optimizer):
        raise RecordingError(
            f"The fused {type(optimizer).__name__} unscales gradients internally, so they cannot be recorded. Create "
            "it with fused=False."
        )
    for state in () if resumed else optimizer.state.values():
        # torch counts steps for every optimizer except SGD and Muon, whose only state appears at the first step
        if any(isinstance(value, Tensor) for value in state.values()) and float(state.get("step", 1)) != 0:
            raise RecordingError(
                f"The {type(optimizer).__name__} has taken steps before, which were not recorded. Create a new one in "
                "configure_optimizers."
            )
    return optimizer


def state_sizes(optimizer: Optimizer, parameters: Iterable[Tensor]) -> list[dict[str, int]]:
    """Return how many numbers the optimizer keeps for each parameter group, by name, with its current settings.

    Args:
        optimizer: The optimizer.
        parameters: Parameters that the optimizer trains.
    """
    those = set(map(id, parameters))
    update = UPDATES[optimizer_path(optimizer)]
    sizes = []
    for group, settings in zip(optimizer.param_groups, current_hyperparameters(optimizer), strict=True):
        trained = tuple(parameter for parameter in group["params"] if id(parameter) in those)
        theta = torch.empty(sum(parameter.numel() for parameter in trained), device="meta")
        state = update.initial_state(theta, settings | {"params": trained})
        sizes.append({name: part.shape[-1] for name, part in state.items()})
    return sizes


def optimizer_path(optimizer: Optimizer) -> str:
    """Return the import path of the optimizer's exact class."""
    return class_path(type(optimizer))


def parameter_layout(module: nn.Module, optimizer: Optimizer) -> ParameterLayout:
    """Return the layout of the parameters that the optimizer trains, group by group.

    Raises:
        RecordingError: If a parameter does not belong to the module, or the parameters have different dtypes.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    groups = [[p for p in group["params"] if p.requires_grad] for group in optimizer.param_groups]
    parameters = [parameter for group in groups for parameter in group]
    if any(id(parameter) not in names for parameter in parameters):
        raise RecordingError(
            "The optimizer trains parameters that are not in module.named_parameters(). Register them on the module."
        )
    if len(dtypes := {parameter.dtype for parameter in parameters}) != 1:
        raise RecordingError(
            f"The optimizer trains parameters with the dtypes {sorted(map(str, dtypes))}, but recording needs exactly "
            "one dtype. Convert the module to one."
        )
    return ParameterLayout(
        tuple(names[id(parameter)] for parameter in parameters),
        tuple(tuple(parameter.shape) for parameter in parameters),
        tuple(len(group) for group in groups),
    )


def refuse_existing(directory: Path, overwrite: bool) -> None:
    """Refuse to overwrite an existing directory.

    Raises:
        RecordingError: If the run directory exists and may not be overwritten.
    """
    if not directory.exists():
        return
    if is_being_written(directory):
        raise RecordingError(f"{directory} is being recorded by another process. Wait for it, or choose another run.")
    if not overwrite:
        raise RecordingError(
            f"{directory} exists. Choose another run name, seed or root, delete it, or record with overwrite=True."
        )
    # overwriting deletes the directory: with a wrong root or name, nothing but a run may be lost
    is_run = directory.is_dir() and (
        (directory / MANIFEST).exists() or all(path.suffix in (".partial", ".lock") for path in directory.iterdir())
    )
    if not is_run:
        raise RecordingError(
            f"{directory} is not a recorded run, so overwrite=True does not delete it. Choose another run name or "
            "another root."
        )
