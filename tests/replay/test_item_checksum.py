"""What a data set returns has the same checksum whenever it is equal, and another one when it is not."""

import collections
import dataclasses
import functools
import os
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from lightning_dtda.replay.item_checksum import item_checksum

DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.bool,
    torch.uint8,
    torch.int64,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
]


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


@pytest.mark.parametrize(("first", "second"), EQUAL.values(), ids=EQUAL)
def test_equal_items_have_one_checksum(first, second):
    assert item_checksum(first) == item_checksum(second)


@pytest.mark.parametrize(("first", "second"), DIFFERENT.values(), ids=DIFFERENT)
def test_different_items_have_different_checksums(first, second):
    assert item_checksum(first) != item_checksum(second)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_of_any_type_count_by_their_values(dtype):
    whole = torch.arange(24).reshape(4, 6).remainder(7).to(dtype)
    for view in (whole.t()[::2], whole[1:2, ::5][:, :1], whole[1, 3], whole[:0], whole[None, 2, None, 1:2]):
        assert item_checksum(view) == item_checksum(view.clone(memory_format=torch.contiguous_format))
    assert item_checksum(whole[1, 1]) != item_checksum(whole[1, 2])
    assert item_checksum(whole[1, 3]) != item_checksum(whole[1, 3:4])


@pytest.mark.parametrize("item", [pair[0] for pair in EQUAL.values()], ids=EQUAL)
def test_what_went_through_a_file_has_the_checksum_that_it_had(item):
    assert item_checksum(pickle.loads(pickle.dumps(item))) == item_checksum(item)


@pytest.mark.slow
def test_another_process_computes_the_same_checksums():
    """With another seed for the hashes of strings, on which the order of sets depends, and other addresses."""
    code = (
        "from tests.replay.test_item_checksum import *\n"
        "print([item_checksum(item) for pairs in (EQUAL, DIFFERENT) for pair in pairs.values() for item in pair])"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }
    here = [item_checksum(item) for pairs in (EQUAL, DIFFERENT) for pair in pairs.values() for item in pair]
    assert found == {f"{here}\n"}


def test_a_cached_property_that_was_asked_for_changes_nothing():
    asked = molecule()
    asked.center  # noqa: B018
    assert "center" in vars(asked)
    assert item_checksum(asked) == item_checksum(molecule())


def test_what_has_no_pickle_counts_by_its_class_and_the_rest_by_its_content():
    assert item_checksum((threading.Lock(), 1)) == item_checksum((threading.Lock(), 1))
    assert item_checksum((threading.Lock(), 1)) != item_checksum((threading.Lock(), 2))
    assert item_checksum(lambda: 1) == item_checksum(lambda: 2)


def test_many_objects_that_know_each_other_are_read_once_each():
    nodes = [Node(value) for value in range(200)]
    for node in nodes:
        node.neighbours = nodes  # more paths than anybody could follow
    before = item_checksum(nodes[0])
    nodes[150].value = -1
    assert item_checksum(nodes[0]) != before


def test_what_is_nested_too_deep_for_pickle_has_a_checksum_all_the_same():
    item = []
    for _ in range(10_000):
        item = [item]
    assert item_checksum(item) == item_checksum([item])


def test_gaps_between_the_fields_of_an_array_do_not_count():
    dtype = np.dtype([("flag", "i1"), ("value", "f8")], align=True)
    clean, dirty = np.zeros(2, dtype), np.empty(2, dtype)
    dirty.view(np.uint8)[:] = 7
    dirty["flag"], dirty["value"] = 0, 0
    assert clean.tobytes() != dirty.tobytes()
    assert item_checksum(clean) == item_checksum(dirty)
    dirty["value"][1] = 1
    assert item_checksum(clean) != item_checksum(dirty)


def test_images_count_by_their_pixels(tmp_path):
    image = pytest.importorskip("PIL.Image")
    red = image.new("RGB", (4, 3), (255, 0, 0))
    for name in ("a.png", "b.png"):
        red.save(tmp_path / name)
    with image.open(tmp_path / "a.png") as first, image.open(tmp_path / "b.png") as second:
        assert item_checksum((first, 1)) == item_checksum((second, 1)) == item_checksum((red.copy(), 1))
    other = red.copy()
    other.putpixel((1, 1), (255, 0, 1))
    assert item_checksum((other, 1)) != item_checksum((red, 1))
