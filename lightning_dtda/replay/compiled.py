"""Traced steps, compiled: what autograd computes operation by operation, in a few passes over memory."""

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
from lightning_dtda.replay.stacked import Stacked, Trace, compare, first_line, functional
from lightning_dtda.replay.steps import ByName, StepBatch

_log = logging.getLogger(__name__)

_OFTEN = 32
"""How often steps of a further shape must come before it is compiled: the last batch of each epoch does, batches that
are padded to lengths of their own do not."""

_MOST_SHAPES = 4
"""Shapes that are compiled at most: each takes ten seconds to over a minute. Steps of others are run as they are."""

Answer = Callable[[Sequence[Tensor]], list[Tensor]]
"""Given a trace's arguments ``(runs, ...)`` and ``(runs, queries, ...)``, returns results ``(runs, queries, ...)``."""


class Compiled(Stacked):
    """Computes the derivatives of steps by traces that ``torch.compile`` has compiled, where that can be.

    What is compiled is compared with the trace, as the trace is with eager autograd, before it is used.

    Args:
        eager: The eager way, whose module and cuts it shares.
    """

    def __init__(self, eager: Eager) -> None:
        super().__init__(eager)
        self._compiled: dict[Any, Answer | None] = {}
        self._times: Counter[Any] = Counter()

    @property
    def has_compiled(self) -> bool:
        """Whether something was compiled, and computes what its trace does."""
        return any(one is not None for one in self._compiled.values())

    @abstractmethod
    def _compile(self, trace: Trace, arguments: Sequence[Tensor]) -> Answer:
        """Compile a trace for tensors of some shapes."""

    @abstractmethod
    def _without(self, trace: Trace, arguments: list[Tensor], states: list[ByName]) -> list[Tensor] | None:
        """Run a trace that is not compiled; ``None`` leaves the step to eager autograd."""

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
        """Return the shapes, beside those of a trace, for which something is compiled."""
        return [part.shape for part in arguments]

    def _tried(self, trace: Trace, arguments: list[Tensor]) -> Answer | None:
        try:
            with torch.no_grad():
                compiled = self._compile(trace, arguments)
                found, wanted = compiled(arguments), self._by_trace(trace, arguments)
            compare(found, (), wanted, "the compiled step computes something else")
            return compiled
        except Exception as error:  # no compiler, or whatever it cannot do
            _log.info("Steps of %s are not compiled: %s", type(self.replica.module).__name__, first_line(error))
            return None

    def _by_trace(self, trace: Trace, arguments: Sequence[Tensor]) -> list[Tensor]:
        return trace.mapped(*arguments)


class CompiledStack(Compiled):
    """One call for all runs and directions: for small networks."""

    @override
    def _compile(self, trace: Trace, arguments: Sequence[Tensor]) -> Answer:
        compiled = _compile(make_fx(trace.mapped)(*arguments))
        return lambda given: compiled(*given)

    @override
    def _without(self, trace: Trace, arguments: list[Tensor], states: list[ByName]) -> list[Tensor] | None:
        return self._plainly(trace, arguments, states)


class CompiledAlone(Compiled):
    """One run and one direction after another, so that memory does not grow with their number: for large networks.

    A trace is compiled in two halves: the gradient, which is the same for all directions, and what a direction adds.
    """

    _compared = 1, 1

    @override
    def gradient(
        self, batch: StepBatch, theta: Tensor, buffers: ByName, weights: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return super(Stacked, self).gradient(batch, theta, buffers, weights)  # autograd's is as fast

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
    """Split the graph of a trace in what depends on a direction, and what it needs of the rest.

    The first half takes all other arguments, and returns those and the results that the second takes, the direction
    last.
    """
    shared, along = trace.of_one(arguments, 0, 0)
    whole = functional(trace.graph, [*shared, *along])  # nothing may change in place what the next direction needs
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
    """Return the results of a trace's halves for all runs and directions."""
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
