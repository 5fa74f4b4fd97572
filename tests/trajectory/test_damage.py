"""A damaged run is refused with the name of the file, never read as something else."""

import pytest

from lightning_dtda import Ensemble, Run
from lightning_dtda.errors import TrajectoryError
from lightning_dtda.trajectory.storage import read_json, write_json
from tests.trajectory.runs import STEPS, write_run

SHARD = "steps-00000003.safetensors"
CHECKPOINT = "checkpoint-00000003.safetensors"


@pytest.fixture
def directory(tmp_path):
    return write_run(tmp_path / "ensemble" / "run").run.path


def change_manifest(directory, change):
    path = directory / "manifest.json"
    content = read_json(path)
    change(content)
    write_json(path, content)


@pytest.mark.parametrize("name", [SHARD, CHECKPOINT])
@pytest.mark.parametrize("damage", ["missing", "truncated", "longer"])
def test_a_file_of_another_length_is_refused_when_the_ensemble_is_opened(directory, name, damage):
    path = directory / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content[:-1] if damage == "truncated" else content + b"\0")

    with pytest.raises(TrajectoryError, match=f"{path} .*record it again"):
        Ensemble.open(directory.parent)


@pytest.mark.parametrize("name", [SHARD, CHECKPOINT])
def test_a_flipped_bit_is_refused_when_the_file_is_read(directory, name):
    path = directory / name
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    [run] = Ensemble.open(directory.parent)

    with pytest.raises(TrajectoryError, match=f"{path} .*checksum"):
        [run.theta(step) for step in range(STEPS + 1)]


def test_a_manifest_that_is_no_json_is_refused(directory):
    path = directory / "manifest.json"
    path.write_bytes(path.read_bytes()[:-40])

    with pytest.raises(TrajectoryError, match=f"{path} cannot be read"):
        Run(directory)


def test_a_manifest_that_is_no_object_is_refused(directory):
    (directory / "manifest.json").write_text("[]")

    with pytest.raises(TrajectoryError, match="not a JSON object"):
        Run(directory)


def test_a_directory_without_a_manifest_is_refused(tmp_path):
    with pytest.raises(TrajectoryError, match=r"manifest.json does not exist"):
        Run(tmp_path)


def test_a_newer_format_is_refused_with_both_versions(directory):
    change_manifest(directory, lambda content: content.update(format_version=99))

    with pytest.raises(TrajectoryError, match=r"format version 99; .* reads version 2"):
        Run(directory)


def test_a_manifest_that_lacks_a_field_is_refused(directory):
    change_manifest(directory, lambda content: content.pop("threads"))

    with pytest.raises(TrajectoryError, match="missing required field `threads`"):
        Run(directory)


def test_a_field_that_a_later_version_added_is_passed_over(directory):
    change_manifest(directory, lambda content: content.update(colour="green"))

    assert Run(directory).steps == STEPS


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "deeper/file.safetensors", "", "..", 7])
@pytest.mark.parametrize("kind", ["shards", "checkpoints"])
def test_a_file_outside_the_directory_is_never_opened(directory, kind, name):
    (directory.parent / "secret.safetensors").write_bytes(b"secret")
    change_manifest(directory, lambda content: content[kind][0].update(file=name, bytes=6))

    with pytest.raises(TrajectoryError):
        Run(directory)


def test_a_checkpoint_that_lacks_a_parameter_is_refused(directory):
    def rename(content):
        content["parameters"][0]["name"] = "other"

    change_manifest(directory, rename)

    with pytest.raises(TrajectoryError, match=r"at step 3 is missing 'parameters.other'"):
        Run(directory).theta(3)
