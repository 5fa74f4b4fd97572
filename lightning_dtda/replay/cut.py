r"""Where the weights of examples act: at the tensors nearest the loss that still have one row for each example.

.. math:: g(\theta, w) = \sum_z J_z(\theta)^\top \left(w \odot \frac{\partial L}{\partial z}\right)

The tensors z are found by walking back from the loss through the graph of autograd: the first tensor on each path with
an axis that runs over the examples ends the path. Which axis that is follows from what becomes of its length when an
example is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

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
        self._known: list[tuple[_Mark, ...]] = []

    def find(self, loss: Tensor, examples: int) -> list[CutTensor]:
        """Return the tensors z of a loss.

        Args:
            loss: With its graph.
            examples: B, the number of examples in the batch.

        Raises:
            UnknownGraphError: If no such graph was seen.
        """
        for marks in reversed(self._known):
            found = _follow(loss, marks, examples)
            if found is not None:
                return found
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
                _walk([loss, other], [examples, size], 1)
            except UnknownGraphError as error:
                ways.add(str(error))
                continue
            losses.append(other)
            sizes.append(size)
            if len(losses) > _AGREEING:
                break
        if len(losses) == 1:
            raise ReplayError(
                f"{name}.training_step takes another way whenever an example is left out "
                f"({'; '.join(sorted(ways))}), so "
                "that which part of its loss belongs to which example cannot be told. Let it do the same for batches "
                "of any size."
            )
        marks, cut = _walk(losses, sizes, 1)
        if not cut:
            marks, cut = _walk(losses, sizes, _MOST_REPEATS)
        if not cut:
            raise ReplayError(
                f"No tensor on the way to the loss of {name}.training_step has a row for each example, so that "
                "removing "
                "one has no meaning: a loss over the nodes of a graph or over windows of series, say, whose examples "
                "are no rows; or of a batch from which the collate_fn leaves examples out. Let training_step compute a "
                "number for each example, and return their mean or sum."
            )
        self.remember(marks)
        return cut

    def remember(self, marks: Sequence[_Mark]) -> None:
        """Know a graph by what was found at its tensors."""
        if tuple(marks) not in self._known:
            self._known.append(tuple(marks))

    def interleave(self) -> None:
        """Take the rows of examples in the graph that was learned last for interleaved."""
        marks = self._known.pop()
        self.remember(
            [
                mark
                if mark.rows is None or mark.rows.repeats == 1
                else replace(mark, rows=mark.rows._replace(is_blocked=False))
                for mark in marks
            ]
        )


def _walk(losses: Sequence[Tensor], sizes: Sequence[int], most: int) -> tuple[list[_Mark], list[CutTensor]]:
    """Walk back from losses in step.

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
    cut: list[CutTensor] = []
    walks: list[tuple[tuple[Edge, ...], Edge | None]] = [
        (tuple((loss.grad_fn, loss.output_nr) for loss in losses), None)
    ]
    users: dict[Edge, list[Edge]] = {}
    while walks:
        edges, user = walks.pop()
        is_seen = edges[0] in users
        users.setdefault(edges[0], []).extend([] if user is None else [user])
        if is_seen:
            continue
        names = [node.name() for node, _ in edges]
        if len(set(names)) > 1 or len({output for _, output in edges}) > 1:
            raise UnknownGraphError(f"{names[0]} against {names[-1]}")
        shapes = [shapes_out_of(node)[output] for node, output in edges]
        rows = _rows(shapes, sizes, most)
        marks.append(_Mark(names[0], edges[0][1], len(shapes[0]), rows))
        if rows is not None:
            cut.append(CutTensor(*edges[0], rows, users[edges[0]]))
            continue
        lengths = {len(node.next_functions) for node, _ in edges}
        if len(lengths) > 1:
            raise UnknownGraphError(f"{names[0]} of {' against '.join(map(str, sorted(lengths)))} tensors")
        for number, following in enumerate(zip(*(node.next_functions for node, _ in edges), strict=True)):
            if all(node is not None for node, _ in following):
                walks.append((following, (edges[0][0], number)))
    return marks, cut


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


def _follow(loss: Tensor, marks: Sequence[_Mark], examples: int) -> list[CutTensor] | None:
    """Walk back from a loss along what was found for another one; ``None`` where it is not the same graph."""
    cut: list[CutTensor] = []
    walks: list[tuple[Edge, Edge | None]] = [((loss.grad_fn, loss.output_nr), None)]
    users: dict[Edge, list[Edge]] = {}
    remaining = iter(marks)
    while walks:
        edge, user = walks.pop()
        is_seen = edge in users
        users.setdefault(edge, []).extend([] if user is None else [user])
        if is_seen:
            continue
        node, output = edge
        mark = next(remaining, None)
        if mark is None or node.name() != mark.name or output != mark.output:
            return None
        shape = shapes_out_of(node)[output]
        if len(shape) != mark.ndim:
            return None
        if mark.rows is not None:
            if shape[mark.rows.axis] != mark.rows.repeats * examples:
                return None
            cut.append(CutTensor(node, output, mark.rows, users[edge]))
            continue
        walks.extend(
            (following, (node, number))
            for number, following in enumerate(node.next_functions)
            if following[0] is not None
        )
    return cut if next(remaining, None) is None else None


def at_cut(cut: Sequence[CutTensor], change: Callable[[int, CutTensor, Tensor], Tensor]) -> list[RemovableHandle]:
    """Change the gradients that arrive at the tensors z, whenever a gradient is computed from now on.

    Args:
        cut: The tensors.
        change: Given a tensor's number, itself and the gradient that arrives, returns what goes on.

    Returns:
        What takes the change away again.
    """
    of_nodes: dict[Any, list[tuple[int, CutTensor]]] = {}
    for number, tensor in enumerate(cut):
        of_nodes.setdefault(tensor.node, []).append((number, tensor))

    def hook_of(tensors: list[tuple[int, CutTensor]]) -> Callable[..., Any]:
        def hook(gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
            changed = list(gradients)
            for number, tensor in tensors:
                gradient = gradients[tensor.output]
                if gradient is not None:
                    changed[tensor.output] = change(number, tensor, gradient)
            return tuple(changed)

        return hook

    return [node.register_prehook(hook_of(tensors)) for node, tensors in of_nodes.items()]


def weigh(cut: Sequence[CutTensor], weights: Tensor) -> list[RemovableHandle]:
    """Let the weights of examples ``(B,)`` act: each row of a gradient on its way to a tensor z is multiplied by one.

    On its way from the loss: what comes by another tensor z, which is made of this one, has been multiplied before.
    """

    def weighed(gradient: Tensor, rows: Rows) -> Tensor:
        shape = [-1 if axis == rows.axis else 1 for axis in range(gradient.ndim)]
        return gradient * rows.spread(weights).to(gradient.dtype).reshape(shape)

    of_users: dict[Any, dict[int, Rows]] = {}
    for tensor in cut:
        for node, number in tensor.users:
            of_users.setdefault(node, {})[number] = tensor.rows

    def hook_of(rows: dict[int, Rows]) -> Callable[..., Any]:
        def hook(gradients: tuple[Tensor | None, ...], _arrived: Any) -> tuple[Tensor | None, ...]:
            return tuple(
                weighed(gradient, rows[number]) if number in rows and gradient is not None else gradient
                for number, gradient in enumerate(gradients)
            )

        return hook

    return [node.register_hook(hook_of(rows)) for node, rows in of_users.items()]


def edges_of(cut: Sequence[CutTensor]) -> list[torch.autograd.graph.GradientEdge]:
    """Return the tensors z as what derivatives can be taken by."""
    return [torch.autograd.graph.GradientEdge(tensor.node, tensor.output) for tensor in cut]


def zeros(found: Tensor | None, like: Tensor) -> Tensor:
    """Return a derivative, zeros where nothing depends on what it is by."""
    return torch.zeros_like(like) if found is None else found
