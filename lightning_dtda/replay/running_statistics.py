"""The running statistics of BatchNorm as values that can be differentiated.

torch updates them in place and treats them as constants. In a recorded training they are part of the state: an example
acts on them through the parameters, and a trained model is measured with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

_BatchNorm = torch.nn.modules.batchnorm._BatchNorm


def batch_norm_layers(module: nn.Module) -> dict[str, nn.modules.batchnorm._BatchNorm]:
    """Return the BatchNorm layers by name."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, _BatchNorm)}


class RunningStatistics:
    """Follows what a pass makes of the running statistics of BatchNorm layers in training mode.

    Args:
        module: The module, its submodules in the modes in which it trains.
    """

    def __init__(self, module: nn.Module) -> None:
        self._layers = {
            name: layer
            for name, layer in batch_norm_layers(module).items()
            if layer.training and layer.track_running_stats and layer.running_mean is not None
        }
        self.names = [_join(name, kind) for name in self._layers for kind in ("running_mean", "running_var")]
        """Names of the buffers."""

    @contextmanager
    def followed(self, before: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        r"""Compute what a pass makes of the statistics, beside what the layers do themselves.

        .. math:: \sigma' = (1 - \mu)\, \sigma + \mu\, s(x)

        with the mean, or the unbiased variance, :math:`s(x)` of the layer's input (Ioffe and Szegedy, arXiv
        1502.03167).

        Args:
            before: The statistics before the pass, by name.

        Yields:
            A dictionary that comes to hold those after it.
        """
        after = dict(before)

        def hook(name: str, layer: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            value = arguments[0] if arguments else named["input"]
            with torch.autocast(value.device.type, enabled=False):
                value = value.to(before[_join(name, "running_mean")].dtype)
                over = [axis for axis in range(value.ndim) if axis != 1]
                variance, mean = torch.var_mean(value, over)
            momentum = layer.momentum
            if momentum is None:  # the mean over all batches; counted before the layer counts this one
                momentum = 1 / (int(layer.num_batches_tracked) + 1)
            for kind, of_batch in (("running_mean", mean), ("running_var", variance)):
                key = _join(name, kind)
                after[key] = (1 - momentum) * after[key] + momentum * of_batch

        with self._hooked(hook):
            yield after

    def exposed(self, statistics: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        r"""Let what is computed in evaluation mode depend on the statistics, by which torch has no derivative.

        The layer's own kernel, with statistics m and v, is given

        .. math:: x' = m + (x - \mu) \sqrt{\frac{v + \epsilon}{\nu + \epsilon}}

        whose value is x at :math:`\mu = m, \nu = v`, and whose derivative is that of the normalisation.

        Args:
            statistics: :math:`\mu` and :math:`\nu` by name, with the values that the layers have.
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
        """Call a function with a layer's name before the layer, as a hook."""
        with ExitStack() as hooks:
            for name, layer in self._layers.items():
                hooks.enter_context(layer.register_forward_pre_hook(partial(hook, name), with_kwargs=True))
            yield


def _join(name: str, kind: str) -> str:
    return f"{name}.{kind}" if name else kind
