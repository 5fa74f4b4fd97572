"""Gradient of a batch's loss for many trainings at once, as one list of tensor operations."""

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
from lightning_dtda.replay.stand_ins import Time
from lightning_dtda.replay.traces import first_line, same_trace

_log = logging.getLogger(__name__)

Gradient = Callable[..., Tensor]


class StackedGradient:
    r"""Computes :math:`\nabla L_b(\theta)` of stacked trainings.

    The transformed function is traced once per batch shape, which leaves the tensor operations without the Python
    overhead, which takes longer. The epoch, step and learning rates become constants of the trace. Therefore it is
    traced at several times of the training, and if the operations differ, no trace is used. Operations that change
    only at other times are not noticed here; the caller has to check for them.

    Args:
        replica: The module.
        structure: Structure of a batch.
        times: Times of the training at which to trace.
    """

    def __init__(self, replica: Replica, structure: TreeSpec, times: Sequence[Time]) -> None:
        self._replica = replica
        replica.metrics_count = False  # metrics read values, of which a stack has many
        self._structure = structure
        self._times = times
        self._graphs: dict[Any, GraphModule] = {}
        self._compilations: dict[Any, Gradient] = {}
        self.traced = True
        """Whether to trace; otherwise each call runs the function itself. Set to false if the traces differ."""
        self.compiled = False
        """Whether to compile the traces."""

    def __call__(self, theta: Tensor, buffers: dict[str, Tensor], leaves: Sequence[Tensor], time: Time) -> Tensor:
        """Return the gradient of ``training_step``'s loss.

        Args:
            theta: Parameters ``(runs, P)``.
            buffers: Buffers and frozen parameters by name, each ``(runs, ...)``.
            leaves: Tensors of a batch, each ``(runs, B, ...)``.
            time: Epoch, step and learning rates at this point of the training.

        Returns:
            Gradient ``(runs, P)``.

        Raises:
            CannotStackError: If ``training_step`` cannot be differentiated for several trainings at once.
        """
        key = tuple(leaf.shape for leaf in leaves)
        if self.traced and key not in self._graphs:
            # a dependence on the time does not depend on the shape of the batch
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
        except Exception as error:  # compilers may raise anything
            _log.warning("torch.compile failed (%s); continuing without.", first_line(error))
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
        except Exception as error:  # the user's code may raise anything
            raise CannotStackError(
                f"training_step cannot be differentiated for several trainings at once ({error!r}): it must not use "
                "values of tensors in Python (.item(), float(), print, a branch on a value)"
            ) from error
