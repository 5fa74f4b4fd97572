"""Random damage to the files of a run: an error that names a file, or the exact content. Never another number."""

import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_dtda import Run
from lightning_dtda.errors import TrajectoryError
from tests.faults.asking import everything
from tests.trajectory.runs import write_run


def same(first, second):
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    return first == second


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    root = tmp_path_factory.mktemp("sound")
    write_run(root / "run")
    return root, everything(root)


DAMAGE = st.sampled_from(["flip", "cut", "grow", "zero", "remove", "swap", "empty"])


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_is_an_error_that_names_a_file_or_changes_nothing(sound, tmp_path, data):
    root, expected = sound
    damaged = tmp_path / "damaged"
    shutil.rmtree(damaged, ignore_errors=True)
    shutil.copytree(root, damaged)
    names = sorted(path.name for path in (damaged / "run").iterdir())
    for _ in range(data.draw(st.integers(1, 3), "how often")):
        name, damage = data.draw(st.sampled_from(names), "file"), data.draw(DAMAGE, "damage")
        path = damaged / "run" / name
        if not path.exists():
            continue
        content = bytearray(path.read_bytes())
        position = data.draw(st.integers(0, max(len(content) - 1, 0)), "where")
        if damage == "flip" and content:
            content[position] ^= 1 << data.draw(st.integers(0, 7), "bit")
        elif damage == "cut":
            del content[position:]
        elif damage == "grow":
            content[position:position] = data.draw(st.binary(min_size=1, max_size=9), "what")
        elif damage == "zero":
            content[position : position + 16] = bytes(len(content[position : position + 16]))
        elif damage == "swap":
            other = damaged / "run" / data.draw(st.sampled_from(names), "with")
            content = bytearray(other.read_bytes()) if other.exists() else content
        elif damage == "empty":
            content = bytearray()
        if damage == "remove":
            path.unlink()
        else:
            path.write_bytes(content)
    try:
        found = everything(damaged)
    except TrajectoryError as error:
        message = str(error)
    else:
        message = None
    assert same(found, expected) if message is None else str(damaged) in message


def test_a_shard_of_another_run_is_refused(tmp_path):
    write_run(tmp_path / "a" / "run", draw=1)
    write_run(tmp_path / "b" / "run", draw=2)
    [shard, *_] = sorted(path.name for path in (tmp_path / "a" / "run").glob("steps-*"))
    shutil.copy(tmp_path / "b" / "run" / shard, tmp_path / "a" / "run" / shard)
    mixed = Run(tmp_path / "a" / "run")
    with pytest.raises(TrajectoryError, match=shard):
        mixed.gradient_vector(0)
