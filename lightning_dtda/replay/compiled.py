"""Traced steps, compiled: a few passes over memory replace autograd's many separate operations."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from typing_extensions import override

from lightning_dtda.replay.eager import Eager
from lightning_dtda.replay.stacked import Stacked
from lightning_dtda.replay.steps import ByName, StepBatch
from lightning_dtda.replay.traces import Trace, check_close, first_line, functional

_log = logging.getLogger(__name__)

_OFTEN = 32
"""Number of steps of the same shape after which it is compiled; the first shape is compiled at once. The last batch of
each epoch comes up often enough, batches padded to individual lengths do not."""

_MOST_SHAPES = 4
"""Maximum number of shapes to compile: each takes ten seconds to over a minute. Other steps run uncompiled."""

Answer = Callable[[Sequence[Tensor]], list[Tensor]]
"""Maps a trace's arguments ``(runs, ...)`` and ``(runs, queries, ...)`` to results ``(runs, queries, ...)``."""


class Compiled(Stacked):
    """Computes the derivatives of steps with traces compiled by ``torch.compile``, where possible.

    Before it is used, a compiled step is compared with its trace, just as the trace is compared with eager autograd.

    Args:
        eager: The eager implementation, whose module and cuts are shared.
    """

    def __init__(self, eager: Eager) -> None:
        super().__init__(eager)
        self._compiled: dict[Any, Answer | None] = {}
        self._times: Counter[Any] = Counter()

    @property
    def has_compiled(self) -> bool:
        """Whether at least one step was compiled and agrees with its trace."""
        return any(one is not None for one in self._compiled.values())

    @abstractmethod
    def _compile(self, trace: Trace, arguments: Sequence[Tensor]) -> Answer:
        """Compile a trace for arguments of these shapes."""

    @abstractmethod
    def _without(self, trace: Trace, arguments: list[Tensor], states: list[ByName]) -> list[Tensor] | None:
        """Run a trace that is not compiled; return ``None`` to leave the step to eager autograd."""

    @override
    def _run_trace(self, trace: Trace, arguments: list[Tensor], states: list[ByName]) -> list[Tensor] | None:
        if not trace.directions:
            return self._plainly(trace, arguments, states)
        given = trace.arguments(arguments, states)
        key = id(trace), *self._shapes(given)
        if key not in self._compiled:
            self._times[key] += 1
            if len(self._compiled) < _MOST_SHAPES and (not self._compiled or self._times[key] >= _OFTEN):
                self._compiled[key] = self._tried(trace, given)
        compiled = self._compiled.get(key)
        if compiled is None:
            return self._without(trace, arguments, states)
        with torch.no_grad():
            return compiled(given)

    def _shapes(self, arguments: Sequence[Tensor]) -> Sequence[torch.Size]:
        """Return the shapes that, together with the trace, identify a compiled step."""
        return [part.shape for part in arguments]

    def _tried(self, trace: Trace, arguments: list[Tensor]) -> Answer | None:
        try:
            with torch.no_grad():
                compiled = self._compile(trace, arguments)
                found, wanted = compiled(arguments), self._by_trace(trace, arguments)
            check_close(found, (), wanted, "the compiled step computes something else")
            return compiled
        except Exception as error:  # no compiler, or an operation that it does not support
            _log.info("Steps of %s are not compiled: %s", type(self.replica.module).__name__, first_line(error))
            return None

    def _by_trace(self, trace: Trace, arguments: Sequence[Tensor]) -> list[Tensor]:
        return trace.mapped(*arguments)


class CompiledStack(Compiled):
    """Computes all runs and directions in one call: for small networks."""

    @override
    def _compile(self, trace: Trace, arguments: Sequence[Tensor]) -> Answer:
        compiled = _compile(make_fx(trace.mapped)(*arguments))
        return lambda given: compiled(*given)

    @override
    def _without(self, trace: Trace, arguments: list[Tensor], states: list[ByName]) -> list[Tensor] | None:
        return self._plainly(trace, arguments, states)


class CompiledAlone(Compiled):
    """Computes one run and direction at a time, so memory does not grow with their number: for large networks.

    A trace is compiled in two halves: the gradient, which all directions share, and the rest, which depends on the
    direction.
    """

    _compared = 1, 1

    @override
    def gradient(
        self, batch: StepBatch, theta: Tensor, buffers: ByName, weights: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return super(Stacked, self).gradient(batch, theta, buffers, weights)  # autograd is as fast

    @override
    def _shapes(self, arguments: Sequence[Tensor]) -> Sequence[torch.Size]:
        return []

    @override
    def _plainly(self, trace: Trace, arguments: list[Tensor], states: list[ByName]) -> list[Tensor]:
        with torch.no_grad():
            return self._by_trace(trace, trace.arguments(arguments, states))

    @override
    def _by_trace(self, trace: Trace, arguments: Sequence[Tensor]) -> list[Tensor]:
        first, second = _halves(trace, arguments)
        return _one_by_one(trace, first, second, arguments)

    @override
    def _without(self, trace: Trace, arguments: list[Tensor], states: list[ByName]) -> list[Tensor] | None:
        return None

    @override
    def _compile(self, trace: Trace, arguments: Sequence[Tensor]) -> Answer:
        first, second = map(_compile, _halves(trace, arguments))
        return lambda given: _one_by_one(trace, first, second, given)


def _compile(graph: GraphModule) -> Callable[..., list[Tensor]]:
    compiled: Callable[..., list[Tensor]] = torch.compile(graph, fullgraph=True, dynamic=False)
    return compiled


def _halves(trace: Trace, arguments: Sequence[Tensor]) -> tuple[GraphModule, GraphModule]:
    """Split the graph of a trace into a part that all directions share and a part that depends on the direction.

    The first half takes all arguments except the direction. It returns the arguments and intermediate results that the
    second half needs; the second half takes these, followed by the direction.
    """
    shared, along = trace.of_one(arguments, 0, 0)
    whole = functional(trace.graph, [*shared, *along])  # in-place changes would corrupt the next direction
    nodes = list(whole.graph.nodes)
    inputs = [node for node in nodes if node.op == "placeholder"]
    late = set(inputs[len(shared) :])
    for node in nodes:
        if not late.isdisjoint(node.all_input_nodes):
            late.add(node)
    late.add(nodes[-1])
    early = [node for node in nodes if node not in late]
    needed = [node for node in early if not late.isdisjoint(node.users)]
    first, second = Graph(), Graph()
    copied: dict[Node, Node] = {}
    for node in early:
        copied[node] = first.node_copy(node, copied.__getitem__)
    first.output([copied[node] for node in needed])
    copied = {node: second.placeholder(node.name) for node in needed}
    for node in nodes:
        if node in late:
            copied[node] = second.node_copy(node, copied.__getitem__)
    return GraphModule(whole, first), GraphModule(whole, second)


def _one_by_one(
    trace: Trace,
    first: Callable[..., list[Tensor]],
    second: Callable[..., list[Tensor]],
    arguments: Sequence[Tensor],
) -> list[Tensor]:
    """Run the two halves of a trace for all runs and directions, one at a time."""
    runs, queries = arguments[-1].shape[:2]
    results: list[Tensor] = []
    for run in range(runs):
        needed = None
        for query in range(queries):
            shared, along = trace.of_one(arguments, run, query)
            needed = first(*shared) if needed is None else needed
            found = second(*needed, *along)
            results = results or [part.new_empty(runs, queries, *part.shape) for part in found]
            for result, part in zip(results, found, strict=True):
                result[run, query] = part
    return results
