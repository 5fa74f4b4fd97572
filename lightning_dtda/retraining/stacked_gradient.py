"""The gradient of a batch's loss for many trainings at once, as one list of tensor operations."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import TreeSpec, tree_unflatten

from lightning_dtda.errors import ReplayError
from lightning_dtda.replay import FunctionalModule
from lightning_dtda.retraining.engine import CannotStackError

_log = logging.getLogger(__name__)

Gradient = Callable[..., Tensor]


class StackedGradient:
    r"""Computes :math:`\nabla L_b(\theta)` of stacked trainings.

    The transformed function is traced once for each shape of batch: what is left are the tensor operations, without
    what Python does on the way, which takes longer than they do. Numbers of the Trainer's clock become constants of
    the trace, so that its user has to make sure that they do not matter.

    Args:
        module: The module.
        structure: Of a batch.
        traced: Whether to trace; otherwise each call is the function itself.
        compiled: Whether what is traced is compiled.
    """

    def __init__(
        self, module: FunctionalModule, structure: TreeSpec, traced: bool = True, compiled: bool = False
    ) -> None:
        self._module = module
        self._structure = structure
        self.traced = traced
        self._compiled = compiled
        self._graphs: dict[Any, Gradient] = {}

    def __call__(self, theta: Tensor, buffers: dict[str, Tensor], leaves: Sequence[Tensor], batch_idx: int) -> Tensor:
        """Return the gradient of ``training_step``'s loss.

        Args:
            theta: Parameters ``(runs, P)``.
            buffers: Buffers and frozen parameters by name, each ``(runs, ...)``.
            leaves: The tensors of a batch, each ``(runs, B, ...)``.
            batch_idx: As ``training_step`` gets it.

        Returns:
            ``(runs, P)``.

        Raises:
            CannotStackError: If ``training_step`` cannot be differentiated for several trainings at once.
        """
        if not self.traced:
            return self._guarded(self._function(batch_idx), theta, buffers, leaves)
        key = tuple(leaf.shape for leaf in leaves)
        if key not in self._graphs:
            self._graphs[key] = self._trace(batch_idx, theta, buffers, leaves)
        return self._graphs[key](theta, buffers, list(leaves))

    def _trace(self, batch_idx: int, theta: Tensor, buffers: dict[str, Tensor], leaves: Sequence[Tensor]) -> Gradient:
        function = self._function(batch_idx)
        graph: Gradient = self._guarded(lambda *arguments: make_fx(function)(*arguments), theta, buffers, leaves)
        return self._compile(graph, theta, buffers, leaves) if self._compiled else graph

    def _compile(
        self, graph: Gradient, theta: Tensor, buffers: dict[str, Tensor], leaves: Sequence[Tensor]
    ) -> Gradient:
        started = time.perf_counter()
        compiled = torch.compile(graph)
        try:
            compiled(theta, buffers, list(leaves))
        except Exception as error:  # whatever compilers on this machine do
            _log.warning("torch.compile fails (%s); going on without.", str(error).strip().splitlines()[0])
            return graph
        _log.info("Compiled in %.0f s.", time.perf_counter() - started)
        return compiled

    def _function(self, batch_idx: int) -> Callable[..., Tensor]:
        def loss(theta: Tensor, buffers: dict[str, Tensor], leaves: list[Tensor]) -> Tensor:
            return self._module.batch_loss(theta, buffers, tree_unflatten(leaves, self._structure), batch_idx)

        return vmap(grad(loss))

    def _guarded(self, function: Callable[..., Any], *arguments: Any) -> Any:
        theta, buffers, leaves = arguments
        try:
            return function(theta, buffers, list(leaves))
        except ReplayError as error:
            raise CannotStackError(str(error)) from error
        except Exception as error:  # whatever the user's code does
            raise CannotStackError(
                f"training_step cannot be differentiated for several trainings at once ({error!r}): it must do without "
                "numbers in place of tensors (.item(), float(), print, a branch on a value)"
            ) from error
