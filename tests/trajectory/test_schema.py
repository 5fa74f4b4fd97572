"""What files may hold, and how anything else is refused."""

import json
import os
import shutil
import sys

import pytest
import torch
from safetensors.torch import load

from lightning_dtda import Run
from lightning_dtda.errors import RecordingError, TrajectoryError
from lightning_dtda.optimizers import UPDATES
from lightning_dtda.trajectory import RunWriter, is_being_written
from lightning_dtda.trajectory.schema import FLOATS, FileEntry, check_tensors, conform
from lightning_dtda.trajectory.storage import crc32, read_json, write_json, write_tensors
from tests.trajectory.runs import STEPS, manifest, write_run

ENTRY = {"file": "steps.safetensors", "bytes": 10, "crc32": 7}


@pytest.fixture
def directory(tmp_path):
    return write_run(tmp_path / "runs" / "run").run.path


def test_an_entry_may_have_more_than_the_schema_says():
    conform(ENTRY | {"colour": "green"}, FileEntry, "index.json")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"bytes": True}, "Expected `int`, got `bool` - at `$.bytes`"),
        ({"bytes": 10.0}, "Expected `int`, got `float`"),
        ({"bytes": -1}, ">= 0"),
        ({"bytes": 2**63}, "<= 9223372036854775807"),
        ({"file": ".."}, "regex"),
        ({"file": "a/b"}, "regex"),
        ({"file": "a" * 300}, "length <= 255"),
    ],
)
def test_an_entry_of_another_type_or_range_is_refused_with_its_place(change, reason):
    with pytest.raises(TrajectoryError) as caught:
        conform(ENTRY | change, FileEntry, "index.json")
    assert "index.json is not valid" in str(caught.value)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({}, "is missing 'x'"),
        ({"x": [1.0]}, "x is of type list, but must be a tensor"),
        ({"x": torch.ones(2, 3), "y": torch.ones(3)}, r"y has shape \(3,\), but must be \(rows\) = \(2,\)"),
        ({"x": torch.ones(2)}, r"x has shape \(2,\), but must be \(rows, 3\)"),
        (
            {"x": torch.ones(2, 3), "y": torch.ones(2).long()},
            "y has data type torch.int64, but must be",
        ),
    ],
)
def test_a_tensor_of_another_kind_is_refused_by_its_name(tensors, reason):
    with pytest.raises(TrajectoryError, match=f"^file{'' if tensors == {} else ':'} {reason}"):
        check_tensors(tensors, {"x": (FLOATS, ("rows", 3)), "y": (FLOATS, ("rows",))}, "file")


def test_deep_and_endless_json_is_refused(tmp_path):
    path = tmp_path / "index.json"
    for levels in (101, 10**6):
        text = '{"a": ' + "[" * levels + "]" * levels
        path.write_text(f'{text}, "crc32": {crc32((text + "}").encode())}}}', encoding="ascii")
        with pytest.raises(TrajectoryError, match=rf"{path} (is damaged: it has too many levels|cannot be read)"):
            read_json(path)
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(TrajectoryError, match="too large"):
        read_json(path)


@pytest.mark.skipif(sys.platform == "win32", reason="pipes and links")
def test_nothing_is_written_through_what_lies_at_the_temporary_name(tmp_path):
    (tmp_path / "precious").write_text("precious", encoding="ascii")
    partial = tmp_path / ".index.json.partial"
    partial.symlink_to(tmp_path / "precious")
    write_json(tmp_path / "index.json", {"a": 1})
    os.mkfifo(partial)
    write_json(tmp_path / "index.json", {"a": 2})
    assert read_json(tmp_path / "index.json") == {"a": 2}
    assert (tmp_path / "precious").read_text(encoding="ascii") == "precious"
    assert not partial.exists()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda content: content.update(steps=STEPS + 1), "the shards do not follow each other"),
        (lambda content: content["shards"].reverse(), "the shards do not follow each other"),
        (lambda content: content["checkpoints"].reverse(), "the checkpoints are not in order"),
        (lambda content: content["checkpoints"].pop(0), "the checkpoints are not in order"),
        (lambda content: content["options"].pop(), "options and groups differ in number"),
        (lambda content: content.update(group_lengths=[1, 2]), "groups and parameters differ in number"),
        (
            lambda content: content["parameters"][0].update(shape=[10**6, 2]),
            "the parameters are larger",
        ),
        (lambda content: content["parameters"][0].update(shape=[0, 2**62, 2**62]), "the parameters are larger"),
        (lambda content: content["hyperparameters"].remove("lr"), "there is no learning rate"),
        (lambda content: content.update(processes=0), "it lists no process"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(directory, change, reason):
    content = read_json(directory / "manifest.json")
    change(content)
    write_json(directory / "manifest.json", content)
    with pytest.raises(TrajectoryError, match=rf"manifest.json is damaged: {reason}"):
        Run(directory)


def test_the_record_of_a_process_has_no_processes_of_its_own(directory):
    content = read_json(directory / "manifest.json") | {"processes": 2}
    write_json(directory / "manifest.json", content)
    shutil.copytree(directory, directory / "process-1")
    with pytest.raises(TrajectoryError, match="process-1 is damaged: it is not the record of one process"):
        Run(directory)


@pytest.mark.parametrize("name", ["indices", "micro_batches", "micro_batch_sizes", "accumulate_grad_batches"])
def test_a_shard_that_contradicts_itself_is_refused(directory, name):
    content = read_json(directory / "manifest.json")
    path = directory / content["shards"][0]["file"]
    tensors = load(path.read_bytes())
    tensors[name][0] = -1
    content["shards"][0] |= write_tensors(path, tensors)
    write_json(directory / "manifest.json", content)
    with pytest.raises(TrajectoryError, match=f"{path} contradicts itself .*{name}"):
        Run(directory).batch_indices(0)


def test_a_state_that_the_optimizer_needs_is_missed(directory):
    content = read_json(directory / "manifest.json")
    path = directory / content["checkpoints"][1]["file"]
    tensors = load(path.read_bytes())
    del tensors["state.0.momentum_buffer"]
    content["checkpoints"][1] |= write_tensors(path, tensors)
    write_json(directory / "manifest.json", content)
    with pytest.raises(TrajectoryError, match=r"at step 3 is missing 'state\.0\.momentum_buffer'"):
        Run(directory).theta(3)


def test_an_unknown_optimizer_is_known_once_its_update_is_added(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", optimizer="mine.Momentum", with_gradients=True).run
    with pytest.raises(TrajectoryError, match=r"mine\.Momentum, whose update is not known here"):
        run.theta(1)
    monkeypatch.setitem(UPDATES, "mine.Momentum", UPDATES["torch.optim.sgd.SGD"])
    assert run.theta(1)["bias"].shape == (3,)


def test_a_lock_that_cannot_be_locked_is_named_and_may_be_deleted(tmp_path):
    lock = tmp_path / "recording.lock"
    lock.mkdir()
    with pytest.raises(RecordingError, match=f"{lock} cannot be locked .*Delete it"):
        is_being_written(tmp_path)
    lock.rmdir()
    assert not is_being_written(tmp_path)
    RunWriter(tmp_path, manifest()).discard()


def test_checksums_of_index_and_files_hang_together(directory):
    path = directory / "checkpoint-00000007.safetensors"
    tensors = {name: 1.5 * tensor for name, tensor in load(path.read_bytes()).items()}
    entry = write_tensors(path, tensors)
    with pytest.raises(TrajectoryError, match="checksum mismatch"):
        Run(directory).theta(STEPS)
    # the index has the checksum of the file, and one of itself
    content = json.loads((directory / "manifest.json").read_bytes())
    content["checkpoints"][-1] |= entry
    (directory / "manifest.json").write_text(json.dumps(content), encoding="ascii")
    with pytest.raises(TrajectoryError, match=r"manifest\.json was altered or damaged"):
        Run(directory)
