"""BatchNorm by its definition: its statistics as values that can be differentiated, and nothing changed in place.

torch's own kernel updates running statistics in place and treats them as constants. In a recorded training they are
part of the state: an example acts on them through the parameters, and a trained model is measured with them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

_BatchNorm = torch.nn.modules.batchnorm._BatchNorm


def batch_norm_layers(module: nn.Module) -> dict[str, nn.modules.batchnorm._BatchNorm]:
    """Return the BatchNorm layers by name."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, _BatchNorm)}


def running_statistics(module: nn.Module) -> list[str]:
    """Name the buffers that BatchNorm layers in training mode update."""
    return [
        f"{name}.{kind}" if name else kind
        for name, layer in batch_norm_layers(module).items()
        if layer.training and layer.track_running_stats
        for kind in ("running_mean", "running_var")
    ]


def is_by_definition() -> bool:
    """Whether :func:`batch_norm_by_definition` is in force."""
    return getattr(functional.batch_norm, "__module__", None) == __name__


@contextmanager
def batch_norm_by_definition(watched: Mapping[int, str]) -> Iterator[dict[str, Tensor]]:
    """Compute ``torch.nn.functional.batch_norm`` by its definition (Ioffe and Szegedy, arXiv 1502.03167, algorithm 1).

    Args:
        watched: Names of running statistics by the ``id`` of their tensors.

    Yields:
        A dictionary that comes to hold the updated statistics by name.
    """
    original = functional.batch_norm
    updated: dict[str, Tensor] = {}

    def update(statistic: Tensor | None, of_batch: Tensor, momentum: float) -> None:
        name = watched.get(id(statistic))
        if statistic is not None and name is not None:
            before = updated.get(name, statistic)  # a layer that is used twice goes on from its first update
            updated[name] = (1 - momentum) * before + momentum * of_batch

    def batch_norm(
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        over = [d for d in range(input.ndim) if d != 1]
        shape = [-1 if d == 1 else 1 for d in range(input.ndim)]
        if training or running_mean is None or running_var is None:
            mean, variance = input.mean(over), input.var(over, unbiased=False)
            count = input.numel() // input.shape[1]
            update(running_mean, mean, momentum)
            update(running_var, variance * (count / max(count - 1, 1)), momentum)
        else:
            mean, variance = running_mean, running_var
        result = (input - mean.reshape(shape)) * (variance + eps).rsqrt().reshape(shape)
        result = result if weight is None else result * weight.reshape(shape)
        return result if bias is None else result + bias.reshape(shape)

    functional.batch_norm = batch_norm
    try:
        yield updated
    finally:
        functional.batch_norm = original
