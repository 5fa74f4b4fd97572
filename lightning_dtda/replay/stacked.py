"""A step's derivatives for all runs and directions at once: eager autograd, traced once for a shape and then mapped.

What is traced is the eager way itself, so that there is one derivative. Left are plain operations on tensors, without
what Python does on the way, which takes longer than they do for a small network. Random numbers are inputs of the
trace; they are drawn beforehand from the recorded states, in the order of the training.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.func import functionalize, vmap
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from lightning_dtda.compatibility import prelu_backward
from lightning_dtda.replay.eager import Eager, Products
from lightning_dtda.replay.examples import Examples
from lightning_dtda.replay.outputs import Outputs
from lightning_dtda.replay.passes import Pass
from lightning_dtda.replay.stand_ins import Time
from lightning_dtda.replay.steps import MicroBatchInputs, StepBatch

_log = logging.getLogger(__name__)

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
"""Relative difference from the eager way that is taken for rounding."""

_DRAWS = frozenset(
    {
        "rand",
        "rand_like",
        "randn",
        "randn_like",
        "randint",
        "randint_like",
        "randperm",
        "bernoulli_.float",
        "bernoulli.p",
        "normal_",
        "normal.float_float",
        "uniform_",
        "random_",
        "exponential_",
        "log_normal_",
        "cauchy_",
        "geometric_",
    }
)
"""Random operations whose numbers depend on the shape of what they are given, not on its values."""


_TIMELY = "the loss depends on the epoch, the step or the learning rate"

_COMPARED_RUNS, _COMPARED_DIRECTIONS = 3, 2
"""Runs and directions over which a trace is mapped when it is compared: different numbers of them."""


def _prelu_backward(gradient: Tensor, value: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    is_positive = value > 0
    return torch.where(is_positive, gradient, weight * gradient), torch.where(is_positive, 0, value * gradient)


_DECOMPOSED = {operation: _prelu_backward for operation in [prelu_backward()] if operation is not None}
"""Operations that torch maps wrongly over two dimensions, by others (torch 2.13: sizes mismatch)."""


class CannotTraceError(Exception):
    """A step cannot be traced, or its trace computes something else."""


class Stacked:
    """Computes the derivatives of steps for all runs and directions at once, where a step can be traced.

    Args:
        eager: The eager way.
    """

    def __init__(self, eager: Eager) -> None:
        self._eager = eager
        self._traces: dict[Any, Trace | None] = {}

    @property
    def has_traced(self) -> bool:
        """Whether a trace was made, and computes what the eager way does."""
        return any(trace is not None for trace in self._traces.values())

    def gradient(
        self, batch: StepBatch, theta: Tensor, buffers: Mapping[str, Tensor], weights: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As :meth:`Eager.gradient`."""
        names = list(self._eager.replica.circumstances.updated_buffers)
        weights = theta.new_ones(len(theta), batch.size) if weights is None else weights
        current = dict(buffers)
        total = torch.zeros_like(theta)
        for number, (part, inputs) in enumerate(_parts(batch)):
            leaves = batch.leaves(number)
            trace = None if leaves is None else self._gradient_trace(batch, number, theta, current, leaves)
            if trace is None or leaves is None:
                return self._eager.gradient(batch, theta, buffers, weights)
            states = [passes[number].states for passes in batch.passes]
            gradient, *after = trace.run([theta, *_sorted(current), *leaves, weights[:, part]], states)
            total += inputs.factor * gradient
            if inputs.keeps_statistics:
                current |= dict(zip(names, after, strict=True))
        return total, {name: current[name] for name in names}

    def products(
        self,
        batch: StepBatch,
        theta: Tensor,
        buffers: Mapping[str, Tensor],
        directions: Tensor,
        statistics_cotangents: Mapping[str, Tensor],
    ) -> Products:
        """As :meth:`Eager.products`."""
        cotangents = {name: statistics_cotangents[name] for name in sorted(statistics_cotangents)}
        before = dict(cotangents)
        terms, total, gradients = [], torch.zeros_like(directions), torch.zeros_like(theta)
        for number, (_, inputs) in reversed(list(enumerate(_parts(batch)))):
            leaves = batch.leaves(number)
            along = [directions if inputs.factor == 1 else directions * inputs.factor, *before.values()]
            trace = None if leaves is None else self._products_trace(batch, number, theta, buffers, leaves, along)
            if trace is None or leaves is None:
                return self._eager.products(batch, theta, buffers, directions, statistics_cotangents)
            states = [passes[number].states for passes in batch.passes]
            if not inputs.keeps_statistics:
                along = [along[0], *map(torch.zeros_like, before.values())]
            found = trace.run([theta, *_sorted(buffers), *leaves], states, along)
            gradient, products, of_examples, *of_statistics = found
            gradients += inputs.factor * gradient[:, 0]
            total += products
            terms.append(of_examples)
            if inputs.keeps_statistics:
                before = dict(zip(before, of_statistics, strict=True))
        return Products(torch.cat(terms[::-1], 2), total, before, gradients)

    def statistics_along(
        self,
        batch: StepBatch,
        theta: Tensor,
        buffers: Mapping[str, Tensor],
        tangents: Tensor,
        before: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """As :meth:`Eager.statistics_along`, which does it."""
        return self._eager.statistics_along(batch, theta, buffers, tangents, before)

    # -- traces

    def _products_trace(
        self,
        batch: StepBatch,
        number: int,
        theta: Tensor,
        buffers: Mapping[str, Tensor],
        leaves: list[Tensor],
        along: list[Tensor],
    ) -> Trace | None:
        inputs = batch.passes[0][number]
        names = sorted(self._eager.statistics.names)

        def function(one: Pass, extra: list[Tensor]) -> list[Tensor]:
            direction = self._eager._parameters(extra[0])
            curved, terms, of_statistics = one.products(direction, dict(zip(names, extra[1:], strict=True)))
            flat = [torch.cat([part.reshape(-1) for part in parts]) for parts in (one.gradient, curved)]
            return [flat[0].detach(), flat[1], terms, *(of_statistics[name] for name in names)]

        def reference(theta: Tensor, extra: list[Tensor], time: Time) -> list[Tensor]:
            current = {name: tensor[0] for name, tensor in buffers.items()}
            with self._eager.passed(replace(inputs, time=time), theta, current) as one:
                return function(one, extra)

        first = [tensor[0, 0] for tensor in along]
        return self._trace("products", batch, number, theta, buffers, leaves, first, function, reference)

    def _gradient_trace(
        self, batch: StepBatch, number: int, theta: Tensor, buffers: Mapping[str, Tensor], leaves: list[Tensor]
    ) -> Trace | None:
        inputs = batch.passes[0][number]
        names = list(self._eager.replica.circumstances.updated_buffers)

        def function(one: Pass, extra: list[Tensor]) -> list[Tensor]:
            after = self._eager.replica.buffers(names) | one.statistics
            return [torch.cat([part.reshape(-1) for part in one.gradient]), *(after[name].clone() for name in names)]

        def reference(theta: Tensor, extra: list[Tensor], time: Time) -> list[Tensor]:
            current = {name: tensor[0] for name, tensor in buffers.items()}
            here = replace(inputs, time=time)
            with self._eager.passed(here, theta, current, extra[0], create_graph=False) as one:
                return function(one, extra)

        return self._trace(
            "gradient",
            batch,
            number,
            theta,
            buffers,
            leaves,
            [theta.new_ones(inputs.examples)],
            function,
            reference,
            is_weighted=True,
        )

    def _trace(
        self,
        kind: str,
        batch: StepBatch,
        number: int,
        theta: Tensor,
        buffers: Mapping[str, Tensor],
        leaves: list[Tensor],
        extra: list[Tensor],
        function: Callable[[Pass, list[Tensor]], list[Tensor]],
        reference: Callable[[Tensor, list[Tensor], Time], list[Tensor]],
        is_weighted: bool = False,
    ) -> Trace | None:
        """Return the trace for a micro-batch of this shape; ``None`` where there is none."""
        inputs = batch.passes[0][number]
        states = [set(passes[number].states) for passes in batch.passes]
        key = (
            kind,
            inputs.examples,
            inputs.keeps_statistics,
            frozenset(states[0]),
            *(leaf.shape[1:] for leaf in leaves),
        )
        if key in self._traces:
            return self._traces[key] if all(other == states[0] for other in states) else None
        self._traces[key] = None
        structure = tree_flatten(inputs.batch())[1]
        sample = [theta[0], *(buffer[0] for buffer in _sorted(buffers)), *(leaf[0] for leaf in leaves)]
        try:
            if states[0] - {"cpu", "cuda"}:
                raise CannotTraceError("random numbers are drawn from other generators than torch's")
            reference(theta[0], extra, inputs.time)  # first: it learns where weights act
            graph = self._graph(function, inputs, sorted(buffers), structure, len(extra), is_weighted, sample + extra)
            trace = Trace.of(graph, self._eager, len(extra) if not is_weighted else 0)
            self._check(trace, inputs, sample, extra, reference, is_weighted)
        except Exception as error:  # whatever the user's code does, and whatever torch cannot map
            _log.info(
                "Steps of %s are run one by one, not stacked: %s",
                type(self._eager.replica.module).__name__,
                str(error).strip().splitlines()[0] if str(error).strip() else repr(error),
            )
            return None
        self._traces[key] = trace
        return trace

    def _check(
        self,
        trace: Trace,
        inputs: MicroBatchInputs,
        sample: list[Tensor],
        extra: list[Tensor],
        reference: Callable[[Tensor, list[Tensor], Time], list[Tensor]],
        is_weighted: bool,
    ) -> None:
        """Compare a trace, mapped over some runs and directions, with the eager way, at this time and at others.

        Raises:
            CannotTraceError: If they differ.
        """
        states = inputs.states
        # not one of each: rules of torch's for mapping operations may be wrong where two are mapped over
        runs, directions = _COMPARED_RUNS, _COMPARED_DIRECTIONS
        generator = torch.Generator().manual_seed(0)
        shape = (runs,) if is_weighted else (runs, directions)
        given = [torch.randn(*shape, *part.shape, generator=generator).to(part) for part in extra]
        theta = torch.stack([sample[0] * (1 + 0.01 * run) for run in range(runs)])
        tensors = [theta, *(torch.stack([tensor] * runs) for tensor in sample[1:])]
        found = (
            trace.run(tensors + given, [states] * runs) if is_weighted else trace.run(tensors, [states] * runs, given)
        )
        tolerance = _TOLERANCE.get(theta.dtype, 1e-3)
        for place in ((run, *([] if is_weighted else [run % directions])) for run in range(runs)):
            wanted = reference(theta[place[0]], [part[place] for part in given], inputs.time)
            for one, other in zip(found, wanted, strict=True):
                _compare(one[place].reshape(other.shape), other, tolerance)
        place = (0,) if is_weighted else (0, 0)
        for time in _others(inputs.time):
            wanted = reference(theta[0], [part[place] for part in given], time)
            for one, other in zip(found, wanted, strict=True):
                _compare(one[place].reshape(other.shape), other, tolerance, _TIMELY)

    def _graph(
        self,
        function: Callable[[Pass, list[Tensor]], list[Tensor]],
        inputs: MicroBatchInputs,
        names: list[str],
        structure: TreeSpec,
        extras: int,
        is_weighted: bool,
        arguments: list[Tensor],
    ) -> GraphModule:
        eager, replica = self._eager, self._eager.replica

        def run(*tensors: Tensor) -> list[Tensor]:
            theta, *rest = tensors
            held, leaves, extra = rest[: len(names)], rest[len(names) : -extras], rest[-extras:]
            parameters = [part.detach().requires_grad_() for part in eager._parameters(theta)]
            buffers = dict(zip(names, held, strict=True))
            weights = (
                (extra[0] if is_weighted else theta.new_ones(inputs.examples)).detach().requires_grad_(not is_weighted)
            )
            before = {name: buffers[name].detach().requires_grad_(not is_weighted) for name in eager.statistics.names}
            with replica.passing(), replica.swapped(parameters, buffers):
                with eager.statistics.followed(before) as after:
                    loss = replica.training_loss(tree_unflatten(leaves, structure), inputs.time, inputs.states)
                cut = eager.cuts.find(loss, inputs.examples)
                one = Pass(loss, cut, parameters, weights, before, after, create_graph=not is_weighted)
                return [tensor.detach() for tensor in function(one, extra)]

        with replica.generators.kept():
            graph: GraphModule = make_fx(run, decomposition_table=_DECOMPOSED)(*arguments)
        return graph


OfOne = Callable[[Tensor, Outputs, list[Tensor], list[Tensor]], list[Tensor]]
"""Given an example's loss, the network's outputs, parameters and what else it was called for, returns tensors."""


def each_example(
    eager: Eager,
    kept: dict[Any, Trace | None],
    what: str,
    examples: Examples,
    indices: Tensor,
    theta: Tensor,
    buffers: Mapping[str, Tensor],
    time: Time,
    states: Mapping[str, Tensor],
    function: OfOne,
    extra: Sequence[Tensor] = (),
    calls: dict[str, list[Any]] | None = None,
) -> list[Tensor]:
    """Apply a function to the passes of examples, each in a batch of its own, in evaluation mode.

    Args:
        eager: Runs the module.
        kept: Traces, by what is computed and for which shapes.
        what: Is computed.
        examples: All examples.
        indices: Which of them ``(B,)``.
        theta: Parameters ``(P,)``.
        buffers: Buffers and frozen parameters.
        time: Where the training stands.
        states: Of the generators before each pass.
        function: What is computed.
        extra: Further arguments of it, each ``(B, ...)``.
        calls: Lists that a pass fills, and that are emptied before each.

    Returns:
        Results, each ``(B, ...)``.
    """
    names = sorted(buffers)

    def of(loss: Tensor, inputs: MicroBatchInputs, parameters: list[Tensor], more: list[Tensor]) -> list[Tensor]:
        cut = eager.cut(loss, inputs)
        return [found.detach() for found in function(loss, Outputs(loss, cut, parameters), parameters, more)]

    def one_by_one(number: int, time: Time = time) -> list[Tensor]:
        index = int(indices[number])
        inputs = MicroBatchInputs(1, time, states, lambda rows: examples.collated([index] * len(rows)))
        _clear(calls)
        with eager.replica.generators.kept(), eager.replica.passing(training=False):
            eager.replica.load(theta, buffers)
            loss = eager.replica.training_loss(inputs.batch(), time, states)
            return of(loss, inputs, eager.replica.parameters, [tensor[number] for tensor in extra])

    leaves = examples.tensors(indices[:, None]) if len(indices) > 1 else None
    shapes = [part.shape[1:] for part in [*(leaves or ()), *extra]]
    key = (what, frozenset(states), *shapes)
    known = None if leaves is None else kept.get(key)
    if known is not None and leaves is not None:
        return known.each([theta, *_sorted(buffers)], [*leaves, *extra], states)
    first = one_by_one(0)
    if leaves is not None:
        if key not in kept:
            kept[key] = None
            structure = tree_flatten(examples.collated([0]))[1]
            inputs = MicroBatchInputs(1, time, states, lambda rows: examples.collated([int(indices[0])] * len(rows)))

            def run(*tensors: Tensor) -> list[Tensor]:
                theta, *rest = tensors
                held, of_batch, more = (
                    rest[: len(names)],
                    rest[len(names) : len(names) + len(leaves)],
                    rest[len(names) + len(leaves) :],
                )
                parameters = [part.detach().requires_grad_() for part in eager._parameters(theta)]
                _clear(calls)
                with (
                    eager.replica.passing(training=False),
                    eager.replica.swapped(parameters, dict(zip(names, held, strict=True))),
                ):
                    loss = eager.replica.training_loss(tree_unflatten(of_batch, structure), time, states)
                    return of(loss, inputs, parameters, more)

            sample = [theta, *_sorted(buffers), *(leaf[0] for leaf in leaves), *(part[0] for part in extra)]
            try:
                with eager.replica.generators.kept():
                    graph = make_fx(run, decomposition_table=_DECOMPOSED)(*sample)
                trace = Trace.of(graph, eager, 0)
                found = trace.each(sample[: 1 + len(names)], [tensor[:2] for tensor in [*leaves, *extra]], states)
                tolerance = _TOLERANCE.get(theta.dtype, 1e-3)
                for number, wanted in enumerate([first, one_by_one(1)]):
                    for one, other in zip(found, wanted, strict=True):
                        _compare(one[number], other, tolerance)
                for later in _others(time):  # it is kept for other runs, and for other steps
                    for one, other in zip(found, one_by_one(0, later), strict=True):
                        _compare(one[0], other, tolerance, _TIMELY)
                kept[key] = trace
            except Exception as error:  # whatever the user's code does, and whatever torch cannot map
                _log.info("%s are computed example by example: %s", what, str(error).strip().split(chr(10))[0])
        trace_of = kept[key]
        if trace_of is not None:
            return trace_of.each([theta, *_sorted(buffers)], [*leaves, *extra], states)
    others = [one_by_one(number) for number in range(1, len(indices))]
    return [torch.stack(parts) for parts in zip(first, *others, strict=True)]


def _clear(calls: dict[str, list[Any]] | None) -> None:
    for found in (calls or {}).values():
        found.clear()


@dataclass
class Trace:
    """A traced step.

    Args:
        graph: With the drawn numbers as its last inputs.
        draws: What draws them: an operation and its arguments, tensors among them by shape.
        eager: The eager way.
        directions: How many of the inputs differ from query to query.
    """

    graph: GraphModule
    draws: list[tuple[Any, tuple[Any, ...], dict[str, Any]]]
    eager: Eager
    directions: int
    is_functional: bool = False

    @classmethod
    def of(cls, graph: GraphModule, eager: Eager, directions: int) -> Trace:
        """Make inputs of what a graph draws.

        Raises:
            CannotTraceError: If it draws what depends on values.
        """
        return cls(graph, _take_draws(graph), eager, directions)

    def run(
        self, tensors: Sequence[Tensor], states: Sequence[Mapping[str, Tensor]], directions: Sequence[Tensor] = ()
    ) -> list[Tensor]:
        """Run it for some runs, and for some directions each.

        Args:
            tensors: Inputs, each ``(runs, ...)``.
            states: Of the generators, for each run.
            directions: Further inputs, each ``(runs, queries, ...)``.

        Returns:
            Results, each ``(runs, ...)``, or ``(runs, queries, ...)`` where there are directions.
        """
        drawn = [torch.stack(of_runs) for of_runs in zip(*map(self._draw, states), strict=True)] if self.draws else []
        arguments = [*tensors, *directions, *drawn]
        try:
            return self._mapped(*arguments)
        except RuntimeError:
            if self.is_functional:
                raise
        # an operation in place, on what is the same for all directions: without such operations
        first = [tensor[0] for tensor in tensors] + [v[0, 0] for v in directions] + [draw[0] for draw in drawn]
        self.graph = make_fx(functionalize(self.graph, remove="mutations"))(*first)
        self.is_functional = True
        return self._mapped(*arguments)

    def each(self, shared: Sequence[Tensor], tensors: Sequence[Tensor], states: Mapping[str, Tensor]) -> list[Tensor]:
        """Run it for some examples, for which some inputs are the same, with the same random numbers for each."""
        drawn = self._draw(states) if self.draws else []
        in_dims = (*[None] * len(shared), *[0] * len(tensors), *[None] * len(drawn))
        with torch.no_grad():
            result: list[Tensor] = vmap(self.graph, in_dims=in_dims)(*shared, *tensors, *drawn)
        return result

    def _mapped(self, *arguments: Tensor) -> list[Tensor]:
        function = self.graph
        if self.directions:
            fixed = len(arguments) - self.directions - len(self.draws)
            inner = (None,) * fixed + (0,) * self.directions + (None,) * len(self.draws)
            function = vmap(function, in_dims=inner)  # type: ignore[assignment]
        with torch.no_grad():
            result: list[Tensor] = vmap(function)(*arguments)
        return result

    def _draw(self, states: Mapping[str, Tensor]) -> list[Tensor]:
        generators = self.eager.replica.generators
        with generators.kept():
            generators.set(states)
            return [draw(*tree_map(_empty, args), **tree_map(_empty, kwargs)) for draw, args, kwargs in self.draws]


@dataclass(frozen=True)
class _Like:
    """A tensor of which only the shape counts."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def _empty(value: Any) -> Any:
    if not isinstance(value, _Like):
        return value
    return torch.empty_strided(value.size, value.stride, dtype=value.dtype, device=value.device)


def _take_draws(graph: GraphModule) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """Replace the random operations of a graph by inputs, and return them."""
    draws = []
    nodes = graph.graph
    last = [node for node in nodes.nodes if node.op == "placeholder"][-1]
    for node in list(nodes.nodes):
        if node.op != "call_function" or torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
            continue
        name = str(node.target).removeprefix("aten.")
        if (name not in _DRAWS and name.split(".")[0] not in _DRAWS) or node.kwargs.get("generator") is not None:
            raise CannotTraceError(f"it draws random numbers that depend on values ({name})")
        draws.append((node.target, tree_map(_like, node.args), tree_map(_like, dict(node.kwargs))))
        with nodes.inserting_after(last):
            last = nodes.placeholder(f"drawn_{len(draws)}")
        with nodes.inserting_before(node):
            copied = nodes.call_function(torch.ops.aten.clone.default, (last,))
        node.replace_all_uses_with(copied)
        nodes.erase_node(node)
    nodes.eliminate_dead_code()
    graph.recompile()
    return draws


def _like(value: Any) -> Any:
    if not isinstance(value, Node):
        return value
    tensor = value.meta["val"] if "val" in value.meta else value.meta["tensor_meta"]
    stride = tensor.stride() if callable(tensor.stride) else tensor.stride
    return _Like(tuple(tensor.shape), tuple(stride), tensor.dtype, getattr(tensor, "device", torch.device("cpu")))


def _compare(found: Tensor, wanted: Tensor, tolerance: float, why: str = "its trace computes something else") -> None:
    """Compare what a trace computes with what the eager way does.

    Raises:
        CannotTraceError: If they differ by more than rounding.
    """
    found, wanted = found.double(), wanted.double()
    if not bool((found - wanted).norm() <= tolerance * wanted.norm() + torch.finfo(torch.float64).eps):
        raise CannotTraceError(why)


def _others(time: Time) -> Iterator[Time]:
    """Yield other times of the same training: a little later, and so late that what changes in time has changed."""
    groups = [
        {key: value * 0.5 if isinstance(value, float) else value for key, value in group.items()}
        for group in time.hyperparameters
    ]
    for epochs, steps in ((1, 7), (10**4, 10**7)):
        yield Time(time.epoch + epochs, time.step + steps, time.batch_idx + 1, groups)


def _parts(batch: StepBatch) -> list[tuple[slice, MicroBatchInputs]]:
    parts, start = [], 0
    for inputs in batch.passes[0]:
        parts.append((slice(start, start + inputs.examples), inputs))
        start += inputs.examples
    return parts


def _sorted(buffers: Mapping[str, Tensor]) -> list[Tensor]:
    return [buffers[name] for name in sorted(buffers)]


def same_trace(first: GraphModule, second: GraphModule) -> bool:
    """Whether two traces are of the same operations, on the same numbers."""
    constants = [
        [getattr(graph, str(node.target)) for node in graph.graph.nodes if node.op == "get_attr"]
        for graph in (first, second)
    ]
    return first.code == second.code and all(map(_equal, *constants))


def _equal(first: Any, second: Any) -> bool:
    """Whether two constants of traces are equal: tensors, or functions that operations take."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return torch.equal(first, second)
    return isinstance(first, GraphModule) and isinstance(second, GraphModule) and same_trace(first, second)
