"""What a data set returns has the same checksum whenever it is equal, and another one when it is not."""

import os
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from lightning_dtda.replay.item_checksum import item_checksum
from tests.replay.items import DIFFERENT, EQUAL, Node, molecule

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
        "from lightning_dtda.replay.item_checksum import item_checksum\n"
        "from tests.replay.items import DIFFERENT, EQUAL\n"
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
