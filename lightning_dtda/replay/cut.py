r"""Where the weights of examples act: at the tensors nearest the loss that still have one row for each example.

.. math:: g(\theta, w) = \sum_z J_z(\theta)^\top \left(w \odot \frac{\partial L}{\partial z}\right)

The tensors z are found by walking back from the loss through the graph of autograd: the first tensor on each path with
an axis that runs over the examples ends the path. Which axis that is follows from what becomes of its length when an
example is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import grad

from lightning_dtda.compatibility import shapes_out_of
from lightning_dtda.errors import ReplayError

_AGREEING = 3
"""Losses of other batches that have to agree on the axis over examples: padding may shrink with the example left
out."""

_MOST_REPEATS = 8
"""Rows that an example may have in a tensor: views, crops, positive and negative partners."""

Edge = tuple[Any, int]
"""A tensor in the graph: the node that made it, and which of the node's outputs it is."""


class Rows(NamedTuple):
    """How the examples of a batch lie in a tensor.

    Args:
        axis: The one over examples.
        repeats: How many rows each example has along it: the views of a contrastive loss, say.
        is_blocked: Whether the first rows of all examples come before their second ones.
    """

    axis: int
    repeats: int = 1
    is_blocked: bool = True

    def spread(self, weights: Tensor) -> Tensor:
        """Return the weights of examples ``(B,)`` as those of rows."""
        if self.repeats == 1:
            return weights
        return weights.repeat(self.repeats) if self.is_blocked else weights.repeat_interleave(self.repeats)

    def of_examples(self, rows: Tensor, examples: int) -> Tensor:
        """Return rows ``(B * repeats, ...)`` example by example ``(B, ...)``."""
        if self.repeats == 1:
            return rows
        shape = (self.repeats, examples) if self.is_blocked else (examples, self.repeats)
        found = rows.unflatten(0, shape)
        return found.transpose(0, 1) if self.is_blocked else found


class CutTensor(NamedTuple):
    """One of the tensors z of a graph.

    Args:
        node: Of the graph.
        output: Which of the node's outputs.
        rows: How the examples lie in it.
        users: What of the loss is made of it: nodes, and which of their inputs it is.
    """

    node: Any
    output: int
    rows: Rows
    users: Sequence[Edge] = ()


class UnknownGraphError(Exception):
    """A graph is none of those whose cut is known."""


@dataclass(frozen=True)
class _Mark:
    """What was found at a tensor on the way back from the loss.

    Args:
        name: Of the node that made it.
        output: Which of the node's outputs it is.
        ndim: Number of its dimensions.
        rows: How the examples lie in it, where the way ends; ``None`` where it goes on.
    """

    name: str
    output: int
    ndim: int
    rows: Rows | None


class Cuts:
    """The cuts of all graphs that a module's loss came with so far.

    Batches of other sizes and lengths have the same graph; a module that takes another way, by the values in its batch
    or at random, has another one.
    """

    def __init__(self) -> None:
        self._known: list[list[_Mark]] = []

    def find(self, loss: Tensor, examples: int) -> list[CutTensor]:
        """Return the tensors z of a loss.

        Args:
            loss: With its graph.
            examples: B, the number of examples in the batch.

        Raises:
            UnknownGraphError: If no such graph was seen.
        """
        for marks in reversed(self._known):
            with suppress(UnknownGraphError):
                return _follow(loss, marks, examples)
        raise UnknownGraphError

    def learn(self, loss: Tensor, examples: int, others: Iterable[tuple[Tensor, int]], name: str) -> list[CutTensor]:
        """Find the tensors z of a loss, from its graph beside those of other batches.

        Args:
            loss: Of the batch.
            examples: B.
            others: Losses of the same batch with one example less, or more, and their numbers of examples. Those that
                have another graph are passed over; of the others a few are enough.
            name: What errors call the module.

        Raises:
            ReplayError: If no other loss has the same graph, or no tensor has a row for each example.
        """
        losses, sizes, ways = [loss], [examples], set()
        for other, size in others:
            try:
                _compare([loss, other], [examples, size], 1)
            except UnknownGraphError as error:
                ways.add(str(error))
                continue
            losses.append(other)
            sizes.append(size)
            if len(losses) > _AGREEING:
                break
        if len(losses) == 1:
            raise ReplayError(
                f"{name}.training_step takes another way whenever an example is left out ({'; '.join(sorted(ways))}), "
                "so that which part of its loss belongs to which example cannot be told. Let it do the same for "
                "batches of any size."
            )
        marks, cut = _compare(losses, sizes, 1)
        if not cut:
            marks, cut = _compare(losses, sizes, _MOST_REPEATS)
        if not cut:
            raise ReplayError(
                f"No tensor on the way to the loss of {name}.training_step has a row for each example, so that "
                "removing one has no meaning: a loss over the nodes of a graph or over windows of series, say, whose "
                "examples are no rows; or of a batch from which the collate_fn leaves examples out. Let training_step "
                "compute a number for each example, and return their mean or sum."
            )
        self._known.append(marks)
        return cut

    def interleave(self) -> None:
        """Take the rows of examples in the graph that was learned last for interleaved."""
        self._known[-1] = [
            mark if mark.rows is None else replace(mark, rows=mark.rows._replace(is_blocked=False))
            for mark in self._known[-1]
        ]


def walk(starts: Sequence[tuple[Edge, ...]], look: Callable[[tuple[Edge, ...]], Rows | None]) -> list[CutTensor]:
    """Walk back through graphs in step, to the first tensor on each path at which a way ends.

    Args:
        starts: Where to begin: a tensor in each of the graphs.
        look: Given a tensor in each of the graphs, says how the examples lie in it where the way ends; ``None`` lets it
            go on.

    Returns:
        The tensors of the first graph at which ways end.
    """
    cut: list[CutTensor] = []
    walks: list[tuple[tuple[Edge, ...], Edge]] = [(start, (None, 0)) for start in starts]
    users: dict[Edge, list[Edge]] = {}
    while walks:
        edges, user = walks.pop()
        first = edges[0]
        is_seen = first in users
        users.setdefault(first, []).append(user)
        if is_seen:
            continue
        rows = look(edges)
        if rows is not None:
            cut.append(CutTensor(*first, rows, users[first]))
            continue
        for number, following in enumerate(zip(*(node.next_functions for node, _ in edges), strict=True)):
            if all(node is not None for node, _ in following):
                walks.append((following, (first[0], number)))
    return cut


def _compare(losses: Sequence[Tensor], sizes: Sequence[int], most: int) -> tuple[list[_Mark], list[CutTensor]]:
    """Walk back from losses in step, and see from the lengths of axes how the examples lie in each tensor.

    Args:
        losses: The losses.
        sizes: Their numbers of examples.
        most: How many rows an example may have.

    Returns:
        What was found at each tensor on the way, and the tensors z of the first loss.

    Raises:
        UnknownGraphError: If the graphs differ.
    """
    marks: list[_Mark] = []

    def look(edges: tuple[Edge, ...]) -> Rows | None:
        names = [node.name() for node, _ in edges]
        if len(set(names)) > 1 or len({output for _, output in edges}) > 1:
            raise UnknownGraphError(f"{names[0]} against {names[-1]}")
        shapes = [shapes_out_of(node)[output] for node, output in edges]
        rows = _rows(shapes, sizes, most)
        marks.append(_Mark(names[0], edges[0][1], len(shapes[0]), rows))
        lengths = {len(node.next_functions) for node, _ in edges}
        if rows is None and len(lengths) > 1:
            raise UnknownGraphError(f"{names[0]} of {' against '.join(map(str, sorted(lengths)))} tensors")
        return rows

    return marks, walk([tuple((loss.grad_fn, loss.output_nr) for loss in losses)], look)


def _rows(shapes: Sequence[Sequence[int]], sizes: Sequence[int], most: int) -> Rows | None:
    """Return the axis over examples: the only one whose length is a multiple of their number in every graph."""
    if len({len(shape) for shape in shapes}) != 1:
        return None
    for repeats in range(1, most + 1):
        axes = [
            axis
            for axis in range(len(shapes[0]))
            if all(shape[axis] == repeats * size for shape, size in zip(shapes, sizes, strict=True))
        ]
        if axes:
            return Rows(axes[0], repeats) if len(axes) == 1 else None
    return None


def _follow(loss: Tensor, marks: Sequence[_Mark], examples: int) -> list[CutTensor]:
    """Walk back from a loss along what was found for another one.

    Raises:
        UnknownGraphError: If it is not the same graph.
    """
    remaining = iter(marks)

    def look(edges: tuple[Edge, ...]) -> Rows | None:
        node, output = edges[0]
        mark = next(remaining, None)
        if mark is None or node.name() != mark.name or output != mark.output:
            raise UnknownGraphError
        shape, rows = shapes_out_of(node)[output], mark.rows
        if len(shape) != mark.ndim or (rows is not None and shape[rows.axis] != rows.repeats * examples):
            raise UnknownGraphError
        return rows

    cut = walk([((loss.grad_fn, loss.output_nr),)], look)
    if next(remaining, None) is not None:
        raise UnknownGraphError
    return cut


@contextmanager
def changed_at(cut: Sequence[CutTensor], change: Callable[[int, CutTensor, Tensor], Tensor]) -> Iterator[None]:
    """Change the gradients that arrive at the tensors z, whenever a gradient is computed inside.

    Args:
        cut: The tensors.
        change: Given a tensor's number, itself and the gradient that arrives, returns what goes on.
    """
    of_nodes: dict[Any, list[tuple[int, CutTensor]]] = {}
    for number, tensor in enumerate(cut):
        of_nodes.setdefault(tensor.node, []).append((number, tensor))

    def hook(tensors: list[tuple[int, CutTensor]], gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        changed = list(gradients)
        for number, tensor in tensors:
            gradient = gradients[tensor.output]
            if gradient is not None:
                changed[tensor.output] = change(number, tensor, gradient)
        return tuple(changed)

    with ExitStack() as hooks:
        for node, tensors in of_nodes.items():
            hooks.enter_context(node.register_prehook(partial(hook, tensors)))
        yield


@contextmanager
def weighed(cut: Sequence[CutTensor], weights: Tensor) -> Iterator[None]:
    """Let the weights of examples ``(B,)`` act inside: each row of a gradient that goes to a tensor z is multiplied.

    On its way from the loss: what comes by another tensor z, which is made of this one, has been multiplied before.
    """

    def weigh(gradient: Tensor, rows: Rows) -> Tensor:
        shape = [-1 if axis == rows.axis else 1 for axis in range(gradient.ndim)]
        return gradient * rows.spread(weights).to(gradient.dtype).reshape(shape)

    of_users: dict[Any, dict[int, Rows]] = {}
    for tensor in cut:
        for node, number in tensor.users:
            of_users.setdefault(node, {})[number] = tensor.rows

    def hook(rows: dict[int, Rows], gradients: tuple[Tensor | None, ...], _arrived: Any) -> tuple[Tensor | None, ...]:
        return tuple(
            weigh(gradient, rows[number]) if number in rows and gradient is not None else gradient
            for number, gradient in enumerate(gradients)
        )

    with ExitStack() as hooks:
        for node, rows in of_users.items():
            hooks.enter_context(node.register_hook(partial(hook, rows)))
        yield


def nodes_behind(tensors: Iterable[Tensor]) -> Iterator[Any]:
    """Yield the nodes of the graph of some tensors, each once."""
    nodes: list[Any] = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        yield node
        following = [other for other, _ in node.next_functions if other is not None and other not in seen]
        seen.update(following)
        nodes.extend(following)


def edges_of(cut: Sequence[CutTensor]) -> list[torch.autograd.graph.GradientEdge]:
    """Return the tensors z as what derivatives can be taken by."""
    return [torch.autograd.graph.GradientEdge(tensor.node, tensor.output) for tensor in cut]


def zeros(found: Tensor | None, like: Tensor) -> Tensor:
    """Return a derivative, zeros where nothing depends on what it is by."""
    return torch.zeros_like(like) if found is None else found


def derivative(
    outputs: Sequence[Tensor | None],
    along: Sequence[Tensor],
    inputs: Sequence[Tensor],
    *,
    retain_graph: bool = True,
) -> list[Tensor]:
    r"""Return :math:`\partial \langle y, v \rangle / \partial x`, zeros where nothing depends on what it is by.

    Args:
        outputs: y; what has no graph is a constant.
        along: v, one tensor for each of y.
        inputs: x.
        retain_graph: Whether the graph is needed afterwards.
    """
    pairs = [(one, v) for one, v in zip(outputs, along, strict=True) if one is not None and one.requires_grad]
    if not pairs:
        return [torch.zeros_like(one) for one in inputs]
    dependent, vectors = zip(*pairs, strict=True)
    found = grad(dependent, inputs, vectors, retain_graph=retain_graph, allow_unused=True)
    return [zeros(one, like) for one, like in zip(found, inputs, strict=True)]
