"""What cannot be recorded is refused before the first step, with the way out in the message."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import BaseFinetuning, StochasticWeightAveraging
from lightning.pytorch.plugins.precision import DoublePrecision, MixedPrecision
from lightning.pytorch.plugins.precision.precision import Precision
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.func import grad_and_value, jvp
from torch.optim import Optimizer

from lightning_dtda.errors import RecordingError, ReplayError
from lightning_dtda.optimizers import UPDATES
from lightning_dtda.recording.configuration import hyperparameter_values, hyperparameters
from lightning_dtda.replay.batch_norm import batch_norm_layers
from lightning_dtda.replay.batches import rows_of
from lightning_dtda.replay.functional import FunctionalModule
from lightning_dtda.replay.random_states import random_states
from lightning_dtda.trajectory import ParameterLayout, is_being_written
from lightning_dtda.trajectory.manifest import MANIFEST

_InstanceNorm = nn.modules.instancenorm._InstanceNorm

LOSS_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Largest relative difference between a batch's loss and the mean of its examples' losses: rounding stays far below
(at most 3e-7 was seen in float32), a loss that is another function of the batch is far above."""

_STEP_HOOKS = ("backward", "optimizer_step", "optimizer_zero_grad", "configure_gradient_clipping")
_TRANSFER_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


def refuse_trainer(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Refuse settings that are known before data are loaded.

    Raises:
        RecordingError: Naming the setting and what to do.
    """
    if not isinstance(trainer, pl.Trainer):
        raise RecordingError(
            f"The Trainer is a {type(trainer).__module__}.{type(trainer).__qualname__}, of another package than the "
            "recorder. Import lightning.pytorch instead of pytorch_lightning throughout."
        )
    if not module.automatic_optimization:
        raise RecordingError(
            f"{type(module).__name__} uses manual optimization, so that its steps are not those of one loss. Use "
            "automatic optimization, or train without the recorder."
        )
    refuse_strategy(trainer.strategy)
    plugin = trainer.precision_plugin
    if type(plugin) not in (Precision, DoublePrecision, MixedPrecision):
        raise RecordingError(
            f"precision={plugin.precision!r} cannot be replayed. Train with Trainer(precision=...) of "
            '"32-true", "64-true", "bf16-mixed" or "16-mixed".'
        )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, StochasticWeightAveraging) or type(callback).__name__ in (
            "WeightAveraging",
            "EMAWeightAveraging",
        ):
            raise RecordingError(
                f"{type(callback).__name__} replaces the trained weights by averages, which are not the end of the "
                "recorded steps. Remove it from the Trainer, or train without the recorder."
            )
        if isinstance(callback, BaseFinetuning):
            raise RecordingError(
                f"{type(callback).__name__} changes which parameters are trained in mid-training; recording needs the "
                "same ones at every step. Remove it from the Trainer, or train each phase on its own."
            )
    for hook in _STEP_HOOKS:
        if is_overridden(hook, module, pl.LightningModule):
            raise RecordingError(
                f"{type(module).__name__}.{hook} changes how a step is taken, which a replay does not follow. Remove "
                "it, or train without the recorder."
            )
    for hook in _TRANSFER_HOOKS:
        data = trainer.datamodule  # type: ignore[attr-defined]
        for owner, base in ((module, pl.LightningModule), (data, pl.LightningDataModule)):
            if owner is not None and is_overridden(hook, owner, base):
                raise RecordingError(
                    f"{type(owner).__name__}.{hook} changes batches on their way to training_step, which a replay "
                    "does not see. Do it in the data set, the collate_fn or training_step."
                )


def refuse_strategy(strategy: Strategy) -> None:
    """Refuse strategies under which no process sees the gradient that is applied.

    Raises:
        RecordingError: Naming the strategy, why, and which ones are followed.
    """
    if isinstance(strategy, SingleDeviceStrategy):
        return
    # subclasses change how gradients are reduced
    if type(strategy) is not DDPStrategy:
        why = (
            "spreads parameters, gradients and the optimizer's state over processes, so that none of them has those of "
            "a step"
            if isinstance(strategy, ModelParallelStrategy | FSDPStrategy | DeepSpeedStrategy)
            else "is not known to apply the mean of the processes' gradients"
        )
        raise RecordingError(
            f'The strategy {type(strategy).__name__} {why}. Train with strategy="ddp", or on one device: '
            'Trainer(devices=1, strategy="auto").'
        )
    if strategy._ddp_comm_hook is not None or strategy._model_averaging_period is not None:
        raise RecordingError(
            "The DDPStrategy has a communication hook or averages models, so that what is applied is not the mean of "
            "the processes' gradients. Leave ddp_comm_hook and model_averaging_period out."
        )


def refuse_layers(module: nn.Module) -> None:
    """Refuse layers whose state a replay does not follow, and those with sparse gradients.

    Raises:
        RecordingError: Naming the first.
    """
    for name, layer in module.named_modules():
        if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)) and layer.sparse:
            raise RecordingError(f"The gradients of layer {name} are sparse. Use dense gradients (sparse=False).")
    for name, batch_norm in batch_norm_layers(module).items():
        if not batch_norm.training:
            continue
        if isinstance(batch_norm, nn.SyncBatchNorm):
            raise RecordingError(
                f"Layer {name} takes its statistics over all processes, which a replay does not follow. Use the "
                "statistics of each process: Trainer(sync_batchnorm=False)."
            )
        if not hasattr(module, "example_losses"):
            raise RecordingError(
                f"Layer {name} is a BatchNorm in training mode: the loss of an example depends on its batch and cannot "
                f"be had from a batch of one. Define {type(module).__name__}.example_losses(batch) -> (B,), the loss "
                "of each example in its batch; or use GroupNorm or LayerNorm; or put the layer in evaluation mode."
            )
        if not batch_norm.track_running_stats:
            raise RecordingError(
                f"Layer {name} keeps no running statistics, so that what is measured on a query depends on the other "
                "queries. Set track_running_stats=True."
            )
        if batch_norm.momentum is None:
            raise RecordingError(
                f"Layer {name} averages its statistics over all batches (momentum=None), which a replay does not "
                "follow. Give it a momentum."
            )
    for name, layer in module.named_modules():
        if isinstance(layer, _InstanceNorm) and layer.training and layer.track_running_stats:
            raise RecordingError(
                f"Layer {name} keeps running statistics, which a replay does not follow. Set track_running_stats=False."
            )


def refuse_optimizers(optimizers: list[Optimizer], scaled: bool = False, resumed: bool = False) -> Optimizer:
    """Return the training's only optimizer.

    Args:
        optimizers: The Trainer's.
        scaled: Whether a gradient scaler is used.
        resumed: Whether the training goes on from steps that are recorded.

    Raises:
        RecordingError: If there are several, it is not known, it was used before, or it hides its gradients.
    """
    if len(optimizers) != 1:
        raise RecordingError(f"The training has {len(optimizers)} optimizers; recording needs one.")
    optimizer = optimizers[0]
    # LightningOptimizer and schedulers wrap instances, never the class: the exact class says what a step computes
    if optimizer_path(optimizer) not in UPDATES:
        supported = ", ".join(path.rsplit(".", 1)[1] for path in UPDATES)
        raise RecordingError(
            f"The optimizer {optimizer_path(optimizer)} is not known, so that its steps cannot be differentiated. "
            f"Train with one of torch.optim's {supported}, or add its update to lightning_dtda.optimizers.UPDATES."
        )
    if getattr(optimizer, "_step_supports_amp_scaling", False) and scaled:
        raise RecordingError(
            f"The fused {type(optimizer).__name__} unscales gradients itself, where they cannot be recorded. Make it "
            "with fused=False."
        )
    for state in () if resumed else optimizer.state.values():
        # torch counts steps for every optimizer but SGD, whose only state is there after the first
        if any(isinstance(value, Tensor) for value in state.values()) and float(state.get("step", 1)) != 0:
            raise RecordingError(
                f"The {type(optimizer).__name__} has taken steps before, which are in no record. Make a new one in "
                "configure_optimizers."
            )
    return optimizer


def state_names(optimizer: Optimizer) -> list[tuple[str, ...]]:
    """Return what the optimizer keeps of each parameter, by parameter group, with its present hyperparameters."""
    update = UPDATES[optimizer_path(optimizer)]
    names, options = hyperparameters(optimizer)
    return [
        tuple(update.initial_state(torch.empty(0), dict(zip(names, values, strict=True)) | group))
        for values, group in zip(hyperparameter_values(optimizer, names), options, strict=True)
    ]


def optimizer_path(optimizer: Optimizer) -> str:
    """Return the import path of the optimizer's exact class."""
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"


def parameter_layout(module: nn.Module, optimizer: Optimizer) -> ParameterLayout:
    """Return the layout of the parameters that the optimizer trains, group by group.

    Raises:
        RecordingError: If they are not all the module's own and of one dtype.
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
            f"The optimizer trains parameters of the dtypes {sorted(map(str, dtypes))}; recording needs exactly one."
        )
    return ParameterLayout(
        tuple(names[id(parameter)] for parameter in parameters),
        tuple(tuple(parameter.shape) for parameter in parameters),
        tuple(len(group) for group in groups),
    )


def check_example_losses(
    module: pl.LightningModule, layout: ParameterLayout, batch: Any, batch_idx: int
) -> FunctionalModule:
    """Check that the mean of the per-example losses is the loss that is trained on, in value and in slope.

    On the first batch, with dropout's masks put in as in a replay. The slope along a random direction is compared too:
    losses can agree in value by accident.

    Returns:
        The module as functions, which know its dropout.

    Raises:
        RecordingError: If they differ, or a per-example loss cannot be had.
    """
    remedy = (
        f"Define {type(module).__name__}.example_losses(batch) -> (B,), the loss of each example, such that its mean "
        "is the loss that training_step returns; where the loss is no mean over examples (a sum, class weights, "
        "contrastive losses, mixup), divide by the batch size or train without the recorder."
    )
    pure = FunctionalModule(module, layout, evaluation_modules(module), device=module.device)
    theta = layout.flatten([module.get_parameter(name) for name in layout.names])
    with isolate_rng():
        states = random_states(theta.device)
        direction = torch.randn_like(theta)
        try:
            rows = rows_of(batch)
            pure.learn_dropout(theta, {}, batch, batch_idx, theta.dtype)
            masks = pure.dropout.draw(states, rows, theta.dtype)
            losses, slopes = jvp(  # type: ignore[misc]
                lambda point: pure.example_losses(point, {}, batch, batch_idx, masks), (theta,), (direction,)
            )
            gradient, trained = grad_and_value(lambda point: pure.batch_loss(point, {}, batch, batch_idx, masks))(theta)
        except ReplayError as error:
            raise RecordingError(str(error)) from error
        except RuntimeError as error:
            raise RecordingError(f"training_step cannot be differentiated as a function ({error}). {remedy}") from error
    if len(losses) != rows:
        raise RecordingError(f"There are {len(losses)} per-example losses for the {rows} examples of a batch. {remedy}")
    tolerance = LOSS_TOLERANCE.get(theta.dtype, LOSS_TOLERANCE[torch.float32])
    # both can be near zero by cancellation, where relative differences are all rounding: hence scales that cannot
    for what, found, wanted, scale in (
        ("value", losses.mean(), trained, losses.abs().mean()),
        ("slope", slopes.mean(), gradient @ direction, gradient.norm()),
    ):
        # a loss of zero at the start has no scale at all
        allowed = tolerance * (torch.maximum(scale, wanted.abs()) + torch.finfo(theta.dtype).eps ** 0.5)
        if wanted.isfinite() and not (found - wanted).abs() <= allowed:
            raise RecordingError(
                f"The mean of the per-example losses is not the loss that is trained on: {what} {found.item():.6g} "
                f"against {wanted.item():.6g} on the first batch. {remedy}"
            )
    return pure


def evaluation_modules(module: nn.Module) -> list[str]:
    """Name the submodules that are in evaluation mode while the module trains (frozen BatchNorm, say)."""
    return [name for name, layer in module.named_modules() if name and not layer.training]


def refuse_existing(directory: Path, overwrite: bool) -> None:
    """Refuse to record over something.

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
    # overwriting deletes: a wrong root or name must not cost anything but a run
    is_run = directory.is_dir() and (
        (directory / MANIFEST).exists() or all(path.suffix in (".partial", ".lock") for path in directory.iterdir())
    )
    if not is_run:
        raise RecordingError(
            f"{directory} is no recorded run, so that overwrite=True does not delete it. Choose another run name, or "
            "another root."
        )
