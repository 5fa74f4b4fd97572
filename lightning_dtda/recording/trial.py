"""A trial attribution step on the first batch, so that problems show before the training and not after it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_dtda.errors import DTDAError, RecordingError, ReplayError
from lightning_dtda.recording import checks
from lightning_dtda.recording.configuration import circumstances, current_hyperparameters
from lightning_dtda.replay.cut import nodes_behind
from lightning_dtda.replay.eager import Eager, sharing
from lightning_dtda.replay.examples import Examples
from lightning_dtda.replay.kernels import drops_out_inside
from lightning_dtda.replay.measurements import loss
from lightning_dtda.replay.measuring import Draws, measure_with_gradients
from lightning_dtda.replay.replica import Replica, buffers
from lightning_dtda.replay.stand_ins import Circumstances, Time
from lightning_dtda.replay.steps import MicroBatchInputs, StepBatch
from lightning_dtda.trajectory import MicroBatch, ParameterLayout

_log = logging.getLogger(__name__)

_NO_DERIVATIVE = "torch::autograd::Error"
"""Name of the node in autograd's graph that raises an error instead of computing a derivative."""

_DROPOUT_INSIDE = {
    "attention": (
        "The attention layers apply dropout inside a fused kernel, which has no second derivative, and no other kernel "
        "draws the same random numbers. Train without fused attention, `with torch.nn.attention.sdpa_kernel("
        "torch.nn.attention.SDPBackend.MATH): trainer.fit(...)`, or without dropout in the attention."
    ),
    "recurrent layer": (
        "A recurrent layer applies dropout inside cuDNN, with random numbers that cannot be reproduced. Set "
        "torch.backends.cudnn.enabled = False before the training, or set the layer's dropout to 0 and put nn.Dropout "
        "between separate layers."
    ),
}
"""Messages that refuse dropout inside a kernel, by what the kernel computes."""


@dataclass(frozen=True)
class Trial:
    """The result of one attribution step on the first batch.

    Args:
        layout: Layout of the parameters that the loss uses.
        circumstances: Circumstances of the training, with the buffers that a step changes.
        shared: What the examples share, as in a manifest.
        eager: Runner of the step.
    """

    layout: ParameterLayout
    circumstances: Circumstances
    shared: dict[str, str]
    eager: Eager


def try_step(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    optimizer: Optimizer,
    batch: MicroBatch,
    make: Callable[[Sequence[int]], Any],
) -> Trial:
    """Run an attribution step: gradient, products, tangents, and the default measurement of an example.

    Args:
        trainer: The Trainer.
        module: The module, which is about to be trained.
        optimizer: Optimizer of the module.
        batch: The first batch.
        make: Function that recreates the batch from some of its rows with the ``collate_fn``.

    Raises:
        RecordingError: If a step cannot be replayed or differentiated.
    """
    layout = checks.parameter_layout(module, optimizer)
    checks.refuse_layers(module)
    time = Time(batch.epoch, batch.global_step, batch.batch_idx, current_hyperparameters(optimizer))
    inputs = MicroBatchInputs(len(batch.indices), time, batch.rng_states, make)
    facts = circumstances(trainer, module)
    try:
        return _try_step(module, layout, facts, trainer.datamodule, inputs)  # type: ignore[attr-defined]
    except ReplayError as error:
        raise RecordingError(str(error)) from error
    except DTDAError:
        raise
    except Exception as error:  # any error in the user's code or in torch's derivatives
        raise RecordingError(
            f"Replaying a step of {type(module).__name__} was tried on the first batch and failed "
            f"({type(error).__name__}: {error}). training_step must also work outside a Trainer, and be twice "
            "differentiable."
        ) from error


def _try_step(
    module: pl.LightningModule,
    layout: ParameterLayout,
    facts: Circumstances,
    datamodule: Any,
    inputs: MicroBatchInputs,
) -> Trial:
    like = module.get_parameter(layout.names[0])
    dtype, device = like.dtype, module.device
    every_buffer = [name for name, _ in module.named_buffers()]
    first = Replica(module, layout, replace(facts, updated_buffers=every_buffer), dtype, device, datamodule=datamodule)
    with first.generators.kept():
        unused, updated = _unused_and_updated(first, module, inputs)
    layout = layout.without(unused)
    if not layout.names:
        raise RecordingError(f"The loss of {type(module).__name__} does not depend on any parameter that is trained.")
    if unused:
        _log.info("The loss does not use the parameters %s; the optimizer leaves them unchanged.", ", ".join(unused))
    facts = replace(facts, updated_buffers=updated)
    eager = Eager(Replica(module, layout, facts, dtype, device, datamodule=datamodule))
    theta = layout.flatten([module.get_parameter(name) for name in layout.names])
    held = _tensors(module, layout)
    followed = {*eager.statistics.names, *(name for name in updated if name.endswith("num_batches_tracked"))}
    if unfollowed := [name for name in updated if name not in followed]:
        _log.warning(
            "A training step changes the buffers %s. A replay restores their values, but responses ignore how they "
            "depend on the examples.",
            ", ".join(unfollowed),
        )
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(1, 1, len(theta), generator=generator, dtype=torch.float64).to(theta)
    stacked = {name: buffer[None] for name, buffer in held.items()}
    cotangents = {name: torch.ones_like(stacked[name])[:, None] for name in eager.statistics.names}
    batch = StepBatch.of([torch.arange(inputs.examples)], [[inputs]], device)
    found = eager.products(batch, theta[None], stacked, direction, cotangents)
    eager.statistics_along(batch, theta[None], stacked, direction, cotangents)
    if not bool(torch.isfinite(found.gradient).all()):
        raise RecordingError(f"The gradient of {type(module).__name__}'s loss is not finite on the first batch.")
    if not bool(torch.isfinite(found.products).all()):
        raise RecordingError(
            f"The second derivative of {type(module).__name__}'s loss is not finite on the first batch, perhaps "
            "because of the square root or the norm of a zero. Add a small number under the root."
        )
    with eager.passed(inputs, theta, held) as one:
        _refuse_once_differentiable(one.gradient, type(module).__name__)
    shared = sharing(eager, inputs, theta, held)
    _try_measurement(eager, inputs, theta, stacked)
    return Trial(layout, facts, shared, eager)


def _refuse_once_differentiable(gradient: Sequence[Tensor], name: str) -> None:
    """Refuse a gradient if a part of it has no derivative: torch fails only when it differentiates that part."""
    if any(node.name() == _NO_DERIVATIVE for node in nodes_behind(gradient)):
        raise RecordingError(
            f"The loss of {name} uses a torch.autograd.Function that is marked with @once_differentiable (a custom "
            "kernel?), so the gradient has no derivative. Use the same operation in plain torch."
        )


def _unused_and_updated(
    replica: Replica, module: pl.LightningModule, inputs: MicroBatchInputs
) -> tuple[list[str], list[str]]:
    """Return the parameters that the loss does not use, and the buffers that a pass changes."""
    layout = replica.layout
    theta = layout.flatten([module.get_parameter(name) for name in layout.names])
    before = _tensors(module, layout)
    with replica.passing(twice=False):
        replica.load(theta, before)
        value = replica.training_loss(inputs.batch(), inputs.time, inputs.states)
        if not value.requires_grad:
            return list(layout.names), []
        if (what := drops_out_inside(value)) is not None:
            raise RecordingError(_DROPOUT_INSIDE[what])
        gradients = torch.autograd.grad(value, replica.parameters, allow_unused=True)
        names = [name for name, _ in module.named_buffers()]
        updated = [name for name, after in replica.buffers(names).items() if not torch.equal(after, before[name])]
    return [name for name, one in zip(layout.names, gradients, strict=True) if one is None], updated


def _try_measurement(eager: Eager, inputs: MicroBatchInputs, theta: Tensor, buffers: Mapping[str, Tensor]) -> None:
    """Take the default measurement of an example, and warn if this fails."""
    queries = Examples([0], collate_fn=lambda rows: inputs.make(rows))  # type: ignore[arg-type]
    try:
        measure_with_gradients(eager, theta[None], buffers, queries, [0], loss, ["the start"], inputs.time, Draws(1))
    except DTDAError as error:
        _log.warning(
            'The measurement "loss" cannot be taken of a single example: %s Use another measurement in attribute().',
            error,
        )


def _tensors(module: pl.LightningModule, layout: ParameterLayout) -> dict[str, Tensor]:
    """Return copies of the buffers and of the parameters that are not in the layout, by name."""
    return {name: tensor.detach().clone() for name, tensor in buffers(module, layout, step=0).items()}
