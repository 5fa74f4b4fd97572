"""The checksums of the examples are a file of the run like the others: listed, kept, and checked when it is read."""

import pytest
import torch

from lightning_dtda import Ensemble, Run
from lightning_dtda.errors import TrajectoryError
from lightning_dtda.trajectory import RunWriter
from lightning_dtda.trajectory.example_checksums import ExampleChecksums
from tests.trajectory.runs import manifest

LENGTH = 10
"""Of the data set of these runs."""


def checksums(stride=1, changed=()):
    values = torch.arange(LENGTH) ** 20 - 2**62
    for index in changed:
        values[index] += 1
    return ExampleChecksums(LENGTH, stride, values[::stride].clone())


def write(directory, **arguments):
    directory.mkdir(parents=True)
    writer = RunWriter(directory, manifest())
    writer.add_examples(checksums(**arguments))
    writer.close("complete")
    return Run(directory)


@pytest.mark.parametrize("stride", [1, 2, 8])
def test_what_is_read_is_what_was_written(tmp_path, stride):
    found = write(tmp_path / "run", stride=stride).example_checksums
    assert (found.length, found.stride) == (LENGTH, stride)
    assert torch.equal(found.values, checksums(stride).values)


def test_a_run_without_has_none(tmp_path):
    (tmp_path / "run").mkdir()
    RunWriter(tmp_path / "run", manifest()).close("complete")
    assert Run(tmp_path / "run").example_checksums is None


def test_50_000_examples_take_8_bytes_each_and_one_line_of_the_manifest(tmp_path):
    bare = manifest()
    (tmp_path / "run").mkdir()
    writer = RunWriter(tmp_path / "run", bare)
    writer.add_examples(ExampleChecksums(50_000, 1, torch.zeros(50_000, dtype=torch.int64)))
    writer.close("complete")
    assert (tmp_path / "run" / "examples.safetensors").stat().st_size < 8 * 50_000 + 1000
    assert (tmp_path / "run" / "manifest.json").stat().st_size < 5000


def test_they_stay_when_the_run_goes_on(tmp_path):
    run = write(tmp_path / "run")
    run.manifest.status = "recording"
    RunWriter(run.path, run.manifest).close("complete")
    assert torch.equal(Run(run.path).example_checksums.values, checksums().values)


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_file_of_another_length_is_refused_when_the_ensemble_is_opened(tmp_path, damage):
    path = write(tmp_path / "run").path / "examples.safetensors"
    content = path.read_bytes()
    path.unlink()
    if damage == "truncated":
        path.write_bytes(content[:-1])
    with pytest.raises(TrajectoryError, match=rf"{path} .*record it again"):
        Ensemble.open(tmp_path)


def test_a_flipped_bit_is_refused_when_the_file_is_read(tmp_path):
    run = write(tmp_path / "run")
    path = run.path / "examples.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(TrajectoryError, match=f"{path} .*checksum"):
        Run(run.path).example_checksums  # noqa: B018


def test_a_file_of_another_data_set_is_refused(tmp_path):
    run = write(tmp_path / "run")
    run.manifest.configuration["dataset"]["length"] = 11
    with pytest.raises(TrajectoryError, match="10 checksums with stride 1 cannot belong to 11"):
        run.example_checksums  # noqa: B018


def test_runs_on_different_data_are_no_ensemble_and_the_examples_are_named(tmp_path):
    write(tmp_path / "a")
    write(tmp_path / "b")
    write(tmp_path / "c", stride=2)  # read more slowly
    assert len(Ensemble.open(tmp_path)) == 3
    write(tmp_path / "d", changed=[3, 6])
    with pytest.raises(
        TrajectoryError, match=r"(?s)/a and .*/d were trained on different data.* example 3 \(and 1 oth"
    ):
        Ensemble.open(tmp_path)


def test_of_two_parts_what_both_have_is_compared(tmp_path):
    assert checksums(2).changed(checksums(4, changed=[4])) == [4]
    assert checksums(4, changed=[2, 8]).changed(checksums(2)) == [8]
    assert checksums(2).changed(checksums(1, changed=[3, 5])) == []
