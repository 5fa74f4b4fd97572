"""BatchNorm's running statistics as differentiable values.

torch updates them in place and treats them as constants. In a recorded training they are part of the state: examples
affect them through the parameters, and measurements of the trained model depend on them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_dtda.compatibility import BatchNorm


def batch_norm_layers(module: nn.Module) -> dict[str, BatchNorm]:
    """Return the BatchNorm layers of a module by name."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, BatchNorm)}


def affect_passes(updated: Iterable[str], module: nn.Module, statistics: RunningStatistics) -> bool:
    """Return whether any of the buffers that steps update may affect a pass.

    In training mode, running statistics do not; nor do the counters of layers with a fixed momentum.
    """
    counters = {
        _join(name, "num_batches_tracked")
        for name, layer in batch_norm_layers(module).items()
        if layer.momentum is not None
    }
    return not {*statistics.names, *counters} >= set(updated)


class RunningStatistics:
    """Follows how a pass updates the running statistics of BatchNorm layers in training mode.

    Args:
        module: The module, with each submodule in the mode that it has in training.
    """

    def __init__(self, module: nn.Module) -> None:
        self._layers = {
            name: layer
            for name, layer in batch_norm_layers(module).items()
            if layer.training and layer.track_running_stats and layer.running_mean is not None
        }
        self.names = [_join(name, kind) for name in self._layers for kind in ("running_mean", "running_var")]
        """Names of the buffers that hold running statistics."""

    @contextmanager
    def followed(self, before: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        r"""Compute the statistics after a pass, in addition to the update by the layers themselves.

        .. math:: \sigma' = (1 - \mu)\, \sigma + \mu\, s(x)

        Here :math:`s(x)` is the mean or the unbiased variance of the layer's input (Ioffe and Szegedy, arXiv
        1502.03167).

        Args:
            before: Statistics before the pass, by name.

        Yields:
            A dictionary that the pass fills with the statistics after it.
        """
        after = dict(before)

        def hook(name: str, layer: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            value = arguments[0] if arguments else named["input"]
            with torch.autocast(value.device.type, enabled=False):
                value = value.to(before[_join(name, "running_mean")].dtype)
                over = [axis for axis in range(value.ndim) if axis != 1]
                variance, mean = torch.var_mean(value, over)
            momentum = layer.momentum
            if momentum is None:  # mean over all batches; the hook runs before the layer counts this one
                momentum = 1 / (int(layer.num_batches_tracked) + 1)
            for kind, of_batch in (("running_mean", mean), ("running_var", variance)):
                key = _join(name, kind)
                after[key] = (1 - momentum) * after[key] + momentum * of_batch

        with self._hooked(hook):
            yield after

    def exposed(self, statistics: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        r"""Make evaluation mode differentiable with respect to the statistics, which torch does not support.

        The input x of a layer with statistics m and v is replaced by

        .. math:: x' = m + (x - \mu) \sqrt{\frac{v + \epsilon}{\nu + \epsilon}} .

        Its value is x at :math:`\mu = m, \nu = v`, and its derivative makes that of the normalisation correct.

        Args:
            statistics: Statistics :math:`\mu` and :math:`\nu` by name, equal in value to those of the layers.
        """

        def hook(name: str, layer: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
            mean, variance = statistics[_join(name, "running_mean")], statistics[_join(name, "running_var")]
            value = arguments[0] if arguments else named["input"]
            shape = [-1 if axis == 1 else 1 for axis in range(value.ndim)]
            ratio = ((variance.detach() + layer.eps) / (variance + layer.eps)).sqrt()
            moved = mean.detach().reshape(shape) + (value - mean.reshape(shape)) * ratio.reshape(shape)
            moved = moved.to(value.dtype)
            return ((moved, *arguments[1:]), named) if arguments else (arguments, named | {"input": moved})

        return self._hooked(hook)

    @contextmanager
    def _hooked(self, hook: Callable[..., Any]) -> Iterator[None]:
        """Register a function as a forward pre-hook of each layer; its first argument is the name of the layer."""
        with ExitStack() as hooks:
            for name, layer in self._layers.items():
                hooks.enter_context(layer.register_forward_pre_hook(partial(hook, name), with_kwargs=True))
            yield


def _join(name: str, kind: str) -> str:
    return f"{name}.{kind}" if name else kind
