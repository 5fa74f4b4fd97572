"""The LightningModule as pure functions of its parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_dtda.errors import ReplayError
from lightning_dtda.replay.batch_norm import (
    batch_norm_by_definition,
    batch_norm_layers,
    is_by_definition,
    running_statistics,
)
from lightning_dtda.replay.batches import concatenate, map_tensors, rows_of
from lightning_dtda.replay.dropout import NO_DROPOUT, Dropout, Mask
from lightning_dtda.replay.losses import batch_loss, example_losses
from lightning_dtda.replay.measurements import Measurement
from lightning_dtda.replay.silence import ReplayTrainer, silent_copy
from lightning_dtda.trajectory import ParameterLayout


class FunctionalModule:
    """Losses and measurements of a LightningModule as functions of a flat parameter vector ``(P,)``.

    All methods are pure: they can be differentiated, vmapped over parameters, and leave the user's module alone.

    Args:
        module: The user's module; only its architecture counts.
        layout: The recorded parameters.
        evaluation_modules: Submodules that were in evaluation mode during training.
        dtype: Of the computation; the module's floating point buffers are cast to it.
        device: Of the computation.

    Raises:
        ReplayError: If the module's parameters are not those of the layout.
    """

    def __init__(
        self,
        module: LightningModule,
        layout: ParameterLayout,
        evaluation_modules: Sequence[str] = (),
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        _check_parameters(module, layout)
        self.layout = layout
        self._silent = silent_copy(module, evaluation_modules).to(device=device, dtype=dtype)
        self._call = _Call(self._silent)
        self.dropout = NO_DROPOUT
        self.statistics = running_statistics(self._silent)
        """Buffers that BatchNorm updates in training."""
        self._counters = {f"{name}.num_batches_tracked" for name in batch_norm_layers(self._silent)}
        for layer in batch_norm_layers(self._silent).values():
            layer.num_batches_tracked = None  # counted in place, which a transformed function cannot do
        self._training = {name for name, layer in self._silent.named_modules() if layer.training}

    def set_clock(self, current_epoch: int, global_step: int) -> None:
        """Let ``self.current_epoch`` and ``self.global_step`` be those of a recorded step."""
        self._silent._trainer = ReplayTrainer(current_epoch, global_step)  # type: ignore[assignment]

    def example_losses(
        self,
        theta: Tensor,
        buffers: dict[str, Tensor],
        batch: Any,
        batch_idx: int = 0,
        masks: Sequence[Mask] = (),
    ) -> Tensor:
        """Return the training loss of each example of a batch ``(B,)`` at the parameters ``theta`` ``(P,)``.

        Args:
            theta: Parameters.
            buffers: Buffers and frozen parameters by name; the module's own where there are none.
            batch: B examples.
            batch_idx: As ``training_step`` gets it.
            masks: What :attr:`dropout` drew for the batch.
        """
        return self._apply(theta, buffers, example_losses, batch, batch_idx, self.dropout, masks)

    def losses_and_statistics(
        self,
        theta: Tensor,
        buffers: dict[str, Tensor],
        batch: Any,
        batch_idx: int = 0,
        masks: Sequence[Mask] = (),
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return :meth:`example_losses` and what the pass makes of the buffers :attr:`statistics`."""
        with batch_norm_by_definition({id(buffers[name]): name for name in self.statistics}) as updated:
            losses = self.example_losses(theta, buffers, batch, batch_idx, masks)
        return losses, updated

    def batch_loss(
        self,
        theta: Tensor,
        buffers: dict[str, Tensor],
        batch: Any,
        batch_idx: int = 0,
        masks: Sequence[Mask] = (),
    ) -> Tensor:
        """Return the scalar that ``training_step`` returns for the batch; arguments as :meth:`example_losses`."""
        with self.dropout.for_batch(masks):
            return self._apply(theta, buffers, batch_loss, batch, batch_idx)

    def learn_dropout(
        self, theta: Tensor, buffers: dict[str, Tensor], batch: Any, batch_idx: int, dtype: torch.dtype
    ) -> None:
        """Find out what the module draws in ``training_step``, for :attr:`dropout`.

        Args:
            theta: Parameters ``(P,)``.
            buffers: As for :meth:`example_losses`.
            batch: Any batch of the training.
            batch_idx: As ``training_step`` got it.
            dtype: Of the training.

        Raises:
            ReplayError: If it draws what cannot be drawn again.
        """
        if rows_of(batch) == 1:  # one example says nothing about the dimension over examples
            batch = concatenate([batch, batch])
        single = map_tensors(lambda leaf: leaf[:1], batch)
        # an own example_losses may be all that a batch of one can be passed to
        of_one = example_losses if hasattr(self._silent, "example_losses") else batch_loss
        self.dropout = Dropout.trace(
            lambda: self._apply(theta, buffers, batch_loss, batch, batch_idx),
            lambda: self._apply(theta, buffers, of_one, single, batch_idx),
            rows_of(batch),
            dtype,
            theta.device,
        )

    def measure(self, theta: Tensor, buffers: dict[str, Tensor], batch: Any, measurement: Measurement) -> Tensor:
        """Return the measurement of each query of a batch ``(B,)``, the module in evaluation mode."""
        self._silent.eval()
        try:
            return self._apply(theta, buffers, measurement, batch)
        finally:
            for name, layer in self._silent.named_modules():
                layer.training = name in self._training

    def materialize(self, theta: Tensor, buffers: dict[str, Tensor]) -> LightningModule:
        """Return a copy of the module, in evaluation mode, that holds the parameters ``theta`` ``(P,)`` and buffers."""
        module = copy.deepcopy(self._silent).eval()
        tensors = self.layout.unflatten(theta) | buffers
        with torch.no_grad():
            for name, own in [*module.named_parameters(), *module.named_buffers()]:
                if name in tensors:
                    own.copy_(tensors[name])
                own.requires_grad_(name in self.layout.names)
        return module

    def _apply(
        self, theta: Tensor, buffers: dict[str, Tensor], function: Callable[..., Tensor], *arguments: Any
    ) -> Tensor:
        tensors = self.layout.unflatten(theta) | buffers
        for counter in self._counters & tensors.keys():
            del tensors[counter]
        # of the attention kernels, only the composite one has forward derivatives
        with sdpa_kernel(SDPBackend.MATH), self._batch_norm():
            result: Tensor = functional_call(
                self._call, {f"module.{name}": tensor for name, tensor in tensors.items()}, (function, *arguments)
            )
        return result

    def _batch_norm(self) -> AbstractContextManager[Any]:
        # not again where its statistics are watched
        return batch_norm_by_definition({}) if self._counters and not is_by_definition() else nullcontext()


class _Call(nn.Module):
    """Gives ``functional_call`` a forward that applies any function to the module."""

    def __init__(self, module: LightningModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
        return function(self.module, *arguments)


def _check_parameters(module: LightningModule, layout: ParameterLayout) -> None:
    found = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    for name, shape in zip(layout.names, layout.shapes, strict=True):
        if name not in found:
            raise ReplayError(
                f"The recorded runs have a parameter {name} that {type(module).__name__} lacks. Give the module class "
                "and arguments that were trained."
            )
        if found[name] != shape:
            raise ReplayError(
                f"Parameter {name} has shape {found[name]} in this {type(module).__name__} and {shape} in the "
                "recorded runs. Give the arguments that were trained with."
            )
