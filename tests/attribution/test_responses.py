"""Responses on disk: what is indexed is read, checked, and what a tensor in memory would give."""

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_dtda.attribution.responses import StoredResponses, StoredTable
from lightning_dtda.errors import AttributionError, TrajectoryError
from lightning_dtda.trajectory.schema import FLOATS

RUNS, QUERIES, REMOVALS = 4, 5, 6


@pytest.fixture
def in_memory():
    return torch.randn(RUNS, QUERIES, REMOVALS, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def entries(in_memory, tmp_path):
    return [
        StoredTable.write(
            tmp_path / f"run-{run}.safetensors", "responses", responses, {"baseline": torch.zeros(QUERIES)}
        )
        for run, responses in enumerate(in_memory)
    ]


@pytest.fixture
def stored(entries, tmp_path):
    return StoredResponses([mapped(tmp_path, entry) for entry in entries])


def mapped(directory, entry):
    expected = {"baseline": (FLOATS, ("queries",)), "responses": (FLOATS, ("queries", "removals"))}
    return StoredTable.map(directory, entry, "responses", expected, {})


def damage_last_query(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1 - torch.zeros(QUERIES).nbytes] ^= 1  # the baseline, which is smaller than the responses, comes last
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    "index",
    [
        np.s_[2],
        np.s_[-1, 3],
        np.s_[1, 2, 3],
        np.s_[1:3],
        np.s_[::2, -3],
        np.s_[[2, 0]],
        np.s_[[]],
        np.s_[:, 3],
        np.s_[:, [4, 2]],
        np.s_[:, 1:4, 2:],
        np.s_[:, 0, torch.tensor([5, 1])],
        np.s_[:, np.array([1, 2])],
        np.s_[..., [1, 2]],
        np.s_[..., range(3)],
        np.s_[1, ..., 5],
        np.s_[np.int64(2)],
        np.s_[torch.tensor(2)],
        np.s_[torch.tensor([True, False, True, False])],
        np.s_[[0, 1], [3, 2]],
        np.s_[[0, 1], 1:3, [3, 2]],
        np.s_[None, 2],
        np.s_[()],
    ],
    ids=str,
)
def test_an_index_selects_what_it_selects_of_a_tensor(stored, in_memory, index):
    torch.testing.assert_close(stored[index], in_memory[index], rtol=0, atol=0)


@pytest.mark.parametrize("index", [4, np.s_[:, 5], np.s_[0, 0, 0, 0], np.s_[:, 1.5]], ids=str)
def test_an_index_that_is_none_is_refused_as_by_a_tensor(stored, in_memory, index):
    with pytest.raises((IndexError, TypeError)):
        in_memory[index]
    with pytest.raises((IndexError, TypeError)):
        stored[index]


def test_functions_of_tensors_read_all(stored, in_memory):
    assert stored.shape == in_memory.shape
    assert stored.dtype == in_memory.dtype
    assert torch.equal(stored, in_memory)
    assert torch.equal(torch.as_tensor(np.asarray(stored)), in_memory)
    assert stored.tolist() == in_memory.tolist()
    assert torch.equal(torch.stack(list(stored)), in_memory)
    assert torch.equal(pickle.loads(pickle.dumps(stored)), in_memory)
    assert torch.equal(copy.deepcopy(stored), in_memory)
    found = stored.double().abs().mean((0, 1)) + 1
    assert type(found) is torch.Tensor
    torch.testing.assert_close(found, in_memory.double().abs().mean((0, 1)) + 1)


def test_responses_on_disk_cannot_be_changed(stored, in_memory, tmp_path):
    for change in (lambda: stored.mul_(2), lambda: stored.__setitem__(0, 1.0)):
        with pytest.raises(AttributionError, match=r"cannot be changed\. Change a copy: responses\.clone\(\)"):
            change()
    stored.clone().mul_(2)
    stored[1].mul_(2)
    assert torch.equal(stored, in_memory)


def test_damage_is_found_where_it_is_read_and_nowhere_else(stored, in_memory, tmp_path):
    damage_last_query(tmp_path / "run-2.safetensors")
    assert torch.equal(stored[:, :-1], in_memory[:, :-1])
    assert torch.equal(stored[:2], in_memory[:2])
    with pytest.raises(TrajectoryError, match=r"run-2\.safetensors is damaged"):
        stored[:, -1, 0]
    with pytest.raises(TrajectoryError, match=r"run-2\.safetensors is damaged"):
        stored.sum()


def test_another_file_under_the_same_name_is_found(entries, tmp_path):
    (tmp_path / "run-1.safetensors").rename(tmp_path / "run-2.safetensors")
    mapped(tmp_path, entries[0])
    with pytest.raises(TrajectoryError, match=r"run-2\.safetensors is damaged"):
        mapped(tmp_path, entries[2])


def test_no_responses_are_read_before_they_are_asked_for(stored):
    some = stored[[3, 1]]
    assert isinstance(some, StoredResponses)
    some[:, [0, 2], 1]
    compared = [run.compared.nonzero().flatten().tolist() for run in stored.runs]
    assert compared == [[], [0, 2], [], [0, 2]]


def test_a_single_number_may_lie_anywhere_in_memory(tmp_path):
    # the baseline of one query of several, and one response
    entry = StoredTable.write(
        tmp_path / "run.safetensors", "responses", torch.ones(3, 2)[:1, ::2], {"baseline": torch.arange(6.0)[::6]}
    )
    assert torch.equal(mapped(tmp_path, entry)[0], torch.ones(1))
