r"""Where example weights act: at the tensors closest to the loss that still have one row per example.

.. math:: g(\theta, w) = \sum_z J_z(\theta)^\top \left(w \odot \frac{\partial L}{\partial z}\right)

The tensors z are found by walking back from the loss through the autograd graph: each path ends at the first tensor
with an axis over the examples. That axis is identified by how its length changes when an example is left out.
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
"""Number of losses of other batches that must agree on the axis over examples. One is not enough: padding may shrink
along with the example left out."""

_MOST_REPEATS = 8
"""Maximum number of rows per example in a tensor: views, crops, positive and negative pairs."""

Edge = tuple[Any, int]
"""A tensor in the graph: the node that produced it, and the index of the node's output."""


class Rows(NamedTuple):
    """How the examples of a batch are laid out in a tensor.

    Args:
        axis: Axis over examples.
        repeats: Number of rows per example along that axis, e.g. the views of a contrastive loss.
        is_blocked: Whether the first rows of all examples come before the second rows, and so on.
    """

    axis: int
    repeats: int = 1
    is_blocked: bool = True

    def spread(self, weights: Tensor) -> Tensor:
        """Expand example weights ``(B,)`` to row weights ``(B * repeats,)``."""
        if self.repeats == 1:
            return weights
        return weights.repeat(self.repeats) if self.is_blocked else weights.repeat_interleave(self.repeats)

    def of_examples(self, rows: Tensor, examples: int) -> Tensor:
        """Group rows ``(B * repeats, ...)`` by example ``(B, ...)``."""
        if self.repeats == 1:
            return rows
        shape = (self.repeats, examples) if self.is_blocked else (examples, self.repeats)
        found = rows.unflatten(0, shape)
        return found.transpose(0, 1) if self.is_blocked else found


class CutTensor(NamedTuple):
    """One of the tensors z of a graph.

    Args:
        node: Node that produced the tensor.
        output: Index of the node's output.
        rows: Layout of the examples in the tensor.
        users: Nodes on the way to the loss that use the tensor, each with the index of its input.
    """

    node: Any
    output: int
    rows: Rows
    users: Sequence[Edge] = ()


class UnknownGraphError(Exception):
    """The cut of a graph is not known."""


@dataclass(frozen=True)
class _Mark:
    """Description of a tensor on the way back from the loss.

    Args:
        name: Name of the node that produced the tensor.
        output: Index of the node's output.
        ndim: Number of dimensions.
        rows: Layout of the examples if the path ends here; ``None`` if it continues.
    """

    name: str
    output: int
    ndim: int
    rows: Rows | None


class Cuts:
    """The cuts of all graphs of a module's loss seen so far.

    The graph is the same for batches of all sizes and lengths. It differs if the module branches on the values in a
    batch or at random.
    """

    def __init__(self) -> None:
        self._known: list[list[_Mark]] = []

    def find(self, loss: Tensor, examples: int) -> list[CutTensor]:
        """Return the tensors z of a loss.

        Args:
            loss: Loss with its graph.
            examples: Number of examples B in the batch.

        Raises:
            UnknownGraphError: If no such graph has been seen.
        """
        for marks in reversed(self._known):
            with suppress(UnknownGraphError):
                return _follow(loss, marks, examples)
        raise UnknownGraphError

    def learn(self, loss: Tensor, examples: int, others: Iterable[tuple[Tensor, int]], name: str) -> list[CutTensor]:
        """Find the tensors z of a loss by comparing its graph with those of other batches.

        Args:
            loss: Loss of the batch.
            examples: Number of examples B in the batch.
            others: Losses of the same batch with one example fewer or more, each with its number of examples. Losses
                with a different graph are skipped; a few with the same graph are enough.
            name: Name of the module for error messages.

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
                f"{name}.training_step runs different operations whenever the batch has one example fewer or more "
                f"({'; '.join(sorted(ways))}), so it cannot be determined which part of the loss belongs to which "
                "example. Make training_step run the same operations for batches of any size."
            )
        marks, cut = _compare(losses, sizes, 1)
        if not cut:
            marks, cut = _compare(losses, sizes, _MOST_REPEATS)
        if not cut:
            raise ReplayError(
                f"No tensor on the way to the loss of {name}.training_step has a row for each example, so removing an "
                "example is not defined. This happens if examples are not rows (nodes of a graph, windows of a time "
                "series, say) or if the collate_fn leaves examples out. Make training_step compute a number for each "
                "example and return their mean or sum, and make the collate_fn keep all examples."
            )
        self._known.append(marks)
        return cut

    def interleave(self) -> None:
        """Mark the rows of examples as interleaved in the most recently learned graph."""
        self._known[-1] = [
            mark if mark.rows is None else replace(mark, rows=mark.rows._replace(is_blocked=False))
            for mark in self._known[-1]
        ]


def walk(starts: Sequence[tuple[Edge, ...]], look: Callable[[tuple[Edge, ...]], Rows | None]) -> list[CutTensor]:
    """Walk back through several graphs in parallel, until each path ends.

    Args:
        starts: Starting points, each one tensor per graph.
        look: Function that takes corresponding tensors, one per graph, and returns the layout of their examples to end
            the path, or ``None`` to continue.

    Returns:
        The tensors of the first graph at which the paths end.
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
    """Walk back from losses in parallel, and infer the layout of examples in each tensor from the lengths of its axes.

    Args:
        losses: The losses.
        sizes: Number of examples of each loss.
        most: Maximum number of rows per example.

    Returns:
        A description of each tensor on the way, and the tensors z of the first loss.

    Raises:
        UnknownGraphError: If the graphs differ.
    """
    marks: list[_Mark] = []

    def look(edges: tuple[Edge, ...]) -> Rows | None:
        names = [node.name() for node, _ in edges]
        if len(set(names)) > 1 or len({output for _, output in edges}) > 1:
            raise UnknownGraphError(f"{names[0]} versus {names[-1]}")
        shapes = [shapes_out_of(node)[output] for node, output in edges]
        rows = _rows(shapes, sizes, most)
        marks.append(_Mark(names[0], edges[0][1], len(shapes[0]), rows))
        lengths = {len(node.next_functions) for node, _ in edges}
        if rows is None and len(lengths) > 1:
            raise UnknownGraphError(f"{names[0]} of {' versus '.join(map(str, sorted(lengths)))} tensors")
        return rows

    return marks, walk([tuple((loss.grad_fn, loss.output_nr) for loss in losses)], look)


def _rows(shapes: Sequence[Sequence[int]], sizes: Sequence[int], most: int) -> Rows | None:
    """Return the axis over examples: the only one whose length is the same multiple of the batch size in all graphs."""
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
    """Walk back from a loss along the tensors that were found for another loss.

    Raises:
        UnknownGraphError: If the graphs differ.
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
    """Replace the gradients that arrive at the tensors z in every backward pass inside this context.

    Args:
        cut: The tensors z.
        change: Function that takes a tensor's number, the tensor and the gradient that arrives, and returns the
            gradient to propagate.
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
    """Apply example weights ``(B,)`` in every backward pass inside: multiply the rows of gradients flowing into z.

    Only gradients that come straight from the loss are multiplied: those that pass through another tensor z, computed
    from this one, have been multiplied already.
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
    """Yield each node in the graph of some tensors once."""
    nodes: list[Any] = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        yield node
        following = [other for other, _ in node.next_functions if other is not None and other not in seen]
        seen.update(following)
        nodes.extend(following)


def edges_of(cut: Sequence[CutTensor]) -> list[torch.autograd.graph.GradientEdge]:
    """Return the tensors z as graph edges, with respect to which ``torch.autograd.grad`` can differentiate."""
    return [torch.autograd.graph.GradientEdge(tensor.node, tensor.output) for tensor in cut]


def zeros(found: Tensor | None, like: Tensor) -> Tensor:
    """Return a derivative, or zeros like ``like`` if it is ``None``."""
    return torch.zeros_like(like) if found is None else found


def derivative(
    outputs: Sequence[Tensor | None],
    along: Sequence[Tensor],
    inputs: Sequence[Tensor],
    *,
    retain_graph: bool = True,
) -> list[Tensor]:
    r"""Return :math:`\partial \langle y, v \rangle / \partial x`, with zeros where y does not depend on x.

    Args:
        outputs: Tensors y; those without a graph count as constants.
        along: Direction v, one tensor for each of y.
        inputs: Tensors x.
        retain_graph: Whether the graph is needed afterwards.
    """
    pairs = [(one, v) for one, v in zip(outputs, along, strict=True) if one is not None and one.requires_grad]
    if not pairs:
        return [torch.zeros_like(one) for one in inputs]
    dependent, vectors = zip(*pairs, strict=True)
    found = grad(dependent, inputs, vectors, retain_graph=retain_graph, allow_unused=True)
    return [zeros(one, like) for one, like in zip(found, inputs, strict=True)]
