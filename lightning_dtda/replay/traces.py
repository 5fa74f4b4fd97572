"""Steps traced to graphs of plain tensor operations, to be mapped over runs and directions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import functionalize, vmap
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from lightning_dtda.compatibility import TreeSpec, is_view, prelu_backward, tree_map, tree_unflatten
from lightning_dtda.replay.eager import Eager
from lightning_dtda.replay.kernels import tolerated
from lightning_dtda.replay.random_states import FILLING
from lightning_dtda.replay.stand_ins import Time
from lightning_dtda.replay.steps import ByName

_DRAWS = (FILLING - {"bernoulli_"}) | {
    "rand",
    "rand_like",
    "randn",
    "randn_like",
    "randint",
    "randint_like",
    "randperm",
    "bernoulli_.float",
    "bernoulli.p",
    "normal.float_float",
}
"""Random operations whose result depends on the shape of their input, but not on its values."""

_ZEROS = (torch.ops.aten.zeros_like.default, torch.ops.aten.new_zeros.default, torch.ops.aten.zeros.default)


def _prelu_backward(gradient: Tensor, value: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    is_positive = value > 0
    return torch.where(is_positive, gradient, weight * gradient), torch.where(is_positive, 0, value * gradient)


_DECOMPOSED = {operation: _prelu_backward for operation in [prelu_backward()] if operation is not None}
"""Replacements for operations for which nested ``vmap`` fails (torch 2.13: sizes mismatch)."""


class CannotTraceError(Exception):
    """A step cannot be traced, or its trace computes something else."""


def make_graph(
    eager: Eager,
    function: Callable[[list[Tensor], dict[str, Tensor], Any, list[Tensor]], list[Tensor]],
    names: list[str],
    structure: TreeSpec,
    arguments: list[Tensor],
    training: bool = True,
) -> GraphModule:
    """Trace a function with the parameters and buffers of the module replaced by its inputs.

    Args:
        eager: Eager implementation that runs the module.
        function: Function of parameters, buffers, a batch and further tensors that returns tensors.
        names: Names of the buffers.
        structure: Structure of the batch.
        arguments: Parameters ``(P,)``, buffers, the tensors of the batch, and the further tensors.
        training: Whether the module is in training mode.
    """

    def run(theta: Tensor, *rest: Tensor) -> list[Tensor]:
        parameters = [part.detach().requires_grad_() for part in eager._parameters(theta)]
        buffers = dict(zip(names, rest, strict=False))
        leaves = rest[len(names) : len(names) + structure.num_leaves]
        extra = list(rest[len(names) + len(leaves) :])
        with eager.replica.passing(training=training), eager.replica.swapped(parameters, buffers):
            found = function(parameters, buffers, tree_unflatten(leaves, structure), extra)
        return [part.detach() for part in found]

    with eager.replica.generators.kept():
        graph: GraphModule = make_fx(run, decomposition_table=_DECOMPOSED)(*arguments)
    _leave_zeros_out(graph)
    _let_layouts_differ(graph)
    return graph


def _leave_zeros_out(graph: GraphModule) -> None:
    """Remove additions of zeros: autograd creates zeros for every output when it differentiates a ReLU's derivative."""
    for node in graph.graph.nodes:
        if node.target is not torch.ops.aten.add.Tensor or node.kwargs:
            continue
        for zeros, other in (node.args, node.args[::-1]):
            if isinstance(zeros, Node) and zeros.target in _ZEROS and _described(other) == _described(node):
                node.replace_all_uses_with(other)
                break


def _let_layouts_differ(graph: GraphModule) -> None:
    """Have views be copies where they must: mapped over runs, tensors lie otherwise in memory than those of one run."""
    for node in graph.graph.nodes:
        if is_view(node.target):
            node.target = torch.ops.aten.reshape.default
    graph.recompile()


def _described(node: Any) -> object:
    tensor = node.meta.get("val") if isinstance(node, Node) else None
    return tensor if tensor is None else (tensor.shape, tensor.dtype)


class Trace:
    """A traced step whose random numbers are inputs, placed just before the directions.

    Args:
        graph: Graph of the step.
        eager: The eager implementation.
        directions: Number of inputs, at the end, that differ between queries.

    Raises:
        CannotTraceError: If the step draws random numbers that depend on values.
    """

    def __init__(self, graph: GraphModule, eager: Eager, directions: int = 0) -> None:
        self.graph = graph
        self._draws = _take_draws(graph, directions)
        self._eager = eager
        self.directions = directions
        self._is_functional = False

    def run(self, inputs: Sequence[Tensor], states: Sequence[ByName]) -> list[Tensor]:
        """Run the trace for some runs, with some directions each.

        Args:
            inputs: Inputs, each ``(runs, ...)``; directions are ``(runs, queries, ...)``.
            states: States of the random number generators, for each run.

        Returns:
            The results, each ``(runs, ...)``, or ``(runs, queries, ...)`` if there are directions.
        """
        arguments = self.arguments(inputs, states)
        try:
            with torch.no_grad():
                return self.mapped(*arguments)
        except RuntimeError:
            if self._is_functional:
                raise
        # an in-place operation on a tensor that all directions share; run without in-place operations
        shared, along = self.of_one(arguments, 0, 0)
        self.graph = functional(self.graph, [*shared, *along])
        self._is_functional = True
        with torch.no_grad():
            return self.mapped(*arguments)

    def arguments(self, inputs: Sequence[Tensor], states: Sequence[ByName]) -> list[Tensor]:
        """Return the inputs, with the random numbers of each run ``(runs, ...)`` inserted before the directions."""
        drawn = [torch.stack(of_runs) for of_runs in zip(*map(self._draw, states), strict=True)]
        shared = len(inputs) - self.directions
        return [*inputs[:shared], *drawn, *inputs[shared:]]

    def mapped(self, *arguments: Tensor) -> list[Tensor]:
        """Run the trace for all runs and directions, given the result of :meth:`arguments`."""
        function: Callable[..., Any] = self.graph
        if self.directions:
            over = [None] * (len(arguments) - self.directions) + [0] * self.directions
            function = vmap(function, in_dims=tuple(over))
        result: list[Tensor] = vmap(function)(*arguments)
        return result

    def of_one(self, arguments: Sequence[Tensor], run: int, direction: int) -> tuple[list[Tensor], list[Tensor]]:
        """Return, from the result of :meth:`arguments`, the shared inputs of one run and those of one direction."""
        shared = len(arguments) - self.directions
        return [part[run] for part in arguments[:shared]], [part[run, direction] for part in arguments[shared:]]

    def each(self, shared: Sequence[Tensor], tensors: Sequence[Tensor], states: ByName) -> list[Tensor]:
        """Run the trace for several examples, with the shared inputs and random numbers the same for each."""
        drawn = self._draw(states)
        in_dims = (*[None] * len(shared), *[0] * len(tensors), *[None] * len(drawn))
        with torch.no_grad():
            result: list[Tensor] = vmap(self.graph, in_dims=in_dims)(*shared, *tensors, *drawn)
        return result

    def _draw(self, states: ByName) -> list[Tensor]:
        if not self._draws:
            return []
        generators = self._eager.replica.generators
        with generators.kept():
            generators.set(states)
            return [draw(*tree_map(_made, args), **tree_map(_made, kwargs)) for draw, args, kwargs in self._draws]


def _made(value: Any) -> Any:
    return value() if isinstance(value, partial) else value


def _take_draws(graph: GraphModule, directions: int) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """Replace the random operations of a graph by inputs, placed before the directions, and return the operations."""
    draws = []
    nodes = graph.graph
    inputs = [node for node in nodes.nodes if node.op == "placeholder"]
    last = inputs[len(inputs) - 1 - directions]
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
    """Return a function that creates an empty tensor like the one at a node; other values are returned unchanged."""
    if not isinstance(value, Node):
        return value
    tensor = value.meta["val"]
    return partial(torch.empty_strided, tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


def check_close(
    found: list[Tensor], place: tuple[int, ...], wanted: list[Tensor], why: str = "its trace computes something else"
) -> None:
    """Compare the results of a trace at one place (a run, or a run and direction) with those of eager autograd.

    Raises:
        CannotTraceError: If they differ by more than rounding.
    """
    tolerance = tolerated(wanted[0].dtype, wanted[0].device)
    for one, other in zip(found, wanted, strict=True):
        of_trace, of_eager = one[place].reshape(other.shape).double(), other.double()
        if not bool((of_trace - of_eager).norm() <= tolerance * of_eager.norm() + torch.finfo(torch.float64).eps):
            raise CannotTraceError(why)


def functional(graph: GraphModule, arguments: Sequence[Tensor]) -> GraphModule:
    """Return an equivalent graph without in-place operations."""
    changed: GraphModule = make_fx(functionalize(graph, remove="mutations"))(*arguments)
    return changed


def first_line(error: Exception) -> str:
    """Return the first line of an error message."""
    return (str(error).strip() or repr(error)).splitlines()[0]


def other_times(time: Time) -> Iterator[Time]:
    """Yield two later times of the same training: one soon after, one so late that schedules have taken effect."""
    groups = [
        {key: value * 0.5 if isinstance(value, float) else value for key, value in group.items()}
        for group in time.hyperparameters
    ]
    for epochs, steps in ((1, 7), (10**4, 10**7)):
        yield Time(time.epoch + epochs, time.step + steps, time.batch_idx + 1, groups)


def in_order(buffers: ByName) -> list[Tensor]:
    """Return buffers in the order of their names."""
    return [buffers[name] for name in sorted(buffers)]


def same_trace(first: GraphModule, second: GraphModule) -> bool:
    """Return whether two traces consist of the same operations with the same constants."""
    constants = [
        [getattr(graph, str(node.target)) for node in graph.graph.nodes if node.op == "get_attr"]
        for graph in (first, second)
    ]
    return first.code == second.code and all(map(_equal, *constants))


def _equal(first: Any, second: Any) -> bool:
    """Return whether two constants of traces are equal: tensors, or subgraphs that operations take."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return torch.equal(first, second)
    return isinstance(first, GraphModule) and isinstance(second, GraphModule) and same_trace(first, second)
