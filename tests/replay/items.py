"""Items of data sets: pairs that are equal, and pairs that are not."""

import collections
import dataclasses
import functools

import numpy as np
import torch


@dataclasses.dataclass
class Molecule:
    positions: torch.Tensor
    name: str

    @functools.cached_property
    def center(self):
        return self.positions.mean(0)


class Node:
    """No dataclass, no ``__eq__``: its ``repr`` is an address."""

    def __init__(self, value, *neighbours):
        self.value = value
        self.neighbours = list(neighbours)


class Slots:
    __slots__ = ("value",)

    def __init__(self, value):
        self.value = value


Pair = collections.namedtuple("Pair", "inputs target")


def molecule():
    return Molecule(torch.arange(6.0).reshape(2, 3), "water")


def ring(*values):
    """Nodes of which each knows the next, and the last the first."""
    nodes = [Node(value) for value in values]
    for node, following in zip(nodes, [*nodes[1:], nodes[0]], strict=True):
        node.neighbours.append(following)
    return nodes[0]


EQUAL = {
    "dictionaries in another order": ({"a": 1, "b": [2]}, {"b": [2], "a": 1}),
    "nested dictionaries in another order": ({"a": {"b": 1, "c": 2}}, {"a": {"c": 2, "b": 1}}),
    "sets": ({"a", "b", (1, 2)}, {(1, 2), "b", "a"}),
    "objects": (Node(1, Node(2)), Node(1, Node(2))),
    "dataclasses": (molecule(), molecule()),
    "objects with slots": (Slots(3), Slots(3)),
    "one object twice, and two equal ones": ([[1.5]] * 2, [[1.5], [1.5]]),
    "objects that know each other": (ring(1, 2, 3), ring(1, 2, 3)),
    "views of tensors": ({"x": torch.arange(6.0)[::2]}, {"x": torch.tensor([0.0, 2.0, 4.0])}),
    "tensors in objects": (Node(torch.arange(6.0)[4:]), Node(torch.tensor([4.0, 5.0]))),
    "tensors that need a gradient": (torch.ones(2, requires_grad=True), torch.ones(2)),
    "conjugated": (torch.complex(torch.ones(2), torch.ones(2)).conj(), torch.tensor([1 - 1j, 1 - 1j])),
    "arrays in another memory order": (np.asfortranarray(np.eye(3)[:2]), np.eye(3)[:2].copy()),
    "arrays of objects": (np.array([(1, "a"), None], object), np.array([(1, "a"), None], object)),
    "sparse tensors": (
        torch.sparse_coo_tensor([[0, 0]], [1.0, 2.0], (3,)),
        torch.sparse_coo_tensor([[0]], [3.0], (3,)),
    ),
}

DIFFERENT = {
    "another order": ([1, 2], [2, 1]),
    "another nesting": ([1, [2]], [[1], 2]),
    "joined otherwise": (["ab", "c"], ["a", "bc"]),
    "numbers beyond 64 bits": ([2**70], [2**70 + 1]),
    "one and true": (1, True),
    "text and bytes": ("a", b"a"),
    "an attribute": (Node(1, Node(2)), Node(1, Node(3))),
    "a slot": (Slots(3), Slots(4)),
    "a field": (molecule(), Molecule(torch.arange(6.0).reshape(2, 3), "ice")),
    "a tensor in an object": (Node(torch.zeros(2)), Node(torch.tensor([0.0, 1.0]))),
    "an object in a ring": (ring(1, 2, 3), ring(1, 2, 4)),
    "another shape": (torch.zeros(0, 2), torch.zeros(2, 0)),
    "another type": (torch.zeros(2), torch.zeros(2, dtype=torch.int32)),
    "an element of an array of objects": (np.array(["a", None], object), np.array(["b", None], object)),
    "a mask": (np.ma.array([1, 2], mask=[0, 1]), np.ma.array([1, 2], mask=[0, 0])),
    "an element of a set": ({1, 2}, {1, 3}),
    "a sparse tensor": (torch.eye(2).to_sparse(), 2 * torch.eye(2).to_sparse()),
    "none and zero": (None, 0),
    "a named tuple": (Pair(1, 2), Pair(1, 3)),
}
