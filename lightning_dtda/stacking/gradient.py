"""The gradient of a batch's loss for many trainings at once, as one list of tensor operations."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from lightning_dtda.compatibility import TreeSpec, tree_unflatten
from lightning_dtda.errors import CannotStackError, ReplayError
from lightning_dtda.replay.replica import Replica
from lightning_dtda.replay.stacked import same_trace
from lightning_dtda.replay.stand_ins import Time

_log = logging.getLogger(__name__)

Gradient = Callable[..., Tensor]


class StackedGradient:
    r"""Computes :math:`\nabla L_b(\theta)` of stacked trainings.

    The transformed function is traced once for each shape of batch: what is left are the tensor operations, without
    what Python does on the way, which takes longer than they do. Numbers of the Trainer's clock become constants of
    the trace. So it is traced at several times, and where the operations differ, no trace is used; what happens
    at other times only, the user has to find out.

    Args:
        replica: The module.
        structure: Of a batch.
        times: Of the training, at which to trace.
    """

    def __init__(self, replica: Replica, structure: TreeSpec, times: Sequence[Time]) -> None:
        self._replica = replica
        replica.metrics_count = False  # they look at values, which a stack has many of
        self._structure = structure
        self._times = times
        self._graphs: dict[Any, GraphModule] = {}
        self._compilations: dict[Any, Gradient] = {}
        self.traced = True
        """Whether to trace; otherwise each call is the function itself. Set to false where the traces differ."""
        self.compiled = False
        """Whether what is traced is compiled."""

    def __call__(self, theta: Tensor, buffers: dict[str, Tensor], leaves: Sequence[Tensor], time: Time) -> Tensor:
        """Return the gradient of ``training_step``'s loss.

        Args:
            theta: Parameters ``(runs, P)``.
            buffers: Buffers and frozen parameters by name, each ``(runs, ...)``.
            leaves: The tensors of a batch, each ``(runs, B, ...)``.
            time: Where the training stands.

        Returns:
            ``(runs, P)``.

        Raises:
            CannotStackError: If ``training_step`` cannot be differentiated for several trainings at once.
        """
        key = tuple(leaf.shape for leaf in leaves)
        if self.traced and key not in self._graphs:
            # what depends on the clock does so whatever the shape of the batch
            times = [time] if self._graphs else [time, *(other for other in self._times if other != time)]
            graphs = [self._trace(each, theta, buffers, leaves) for each in times]
            if all(same_trace(graphs[0], graph) for graph in graphs[1:]):
                self._graphs[key] = graphs[0]
            else:
                _log.info("Stacking without a trace: the loss depends on the epoch, the step or the learning rate.")
                self.traced = False
        if not self.traced:
            return self._guarded(self._at(time), theta, buffers, leaves)
        if self.compiled and key not in self._compilations:
            self._compilations[key] = self._compile(self._graphs[key], theta, buffers, leaves)
        gradient = self._compilations[key] if self.compiled else self._graphs[key]
        return gradient(theta, buffers, list(leaves))

    def _trace(self, time: Time, theta: Tensor, buffers: dict[str, Tensor], leaves: Sequence[Tensor]) -> GraphModule:
        function = self._at(time)
        graph: GraphModule = self._guarded(lambda *arguments: make_fx(function)(*arguments), theta, buffers, leaves)
        return graph

    def _compile(
        self, graph: GraphModule, theta: Tensor, buffers: dict[str, Tensor], leaves: Sequence[Tensor]
    ) -> Gradient:
        started = perf_counter()
        compiled = torch.compile(graph)
        try:
            compiled(theta, buffers, list(leaves))
        except Exception as error:  # whatever compilers on this machine do
            _log.warning("torch.compile fails (%s); going on without.", str(error).strip().splitlines()[0])
            return graph
        _log.info("Compiled in %.0f s.", perf_counter() - started)
        return compiled

    def _at(self, time: Time) -> Gradient:
        """Return the gradient as a function."""
        replica = self._replica

        def loss(theta: Tensor, buffers: dict[str, Tensor], leaves: list[Tensor]) -> Tensor:
            parameters = list(replica.layout.unflatten(theta).values())
            with replica.passing(), replica.swapped(parameters, buffers):
                return replica.training_loss(tree_unflatten(leaves, self._structure), time)

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
