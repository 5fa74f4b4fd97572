"""The writer works in a thread of its own, and only what is on disk counts."""

import threading
from contextlib import nullcontext

import pytest
import torch

from lightning_dtda import Run
from lightning_dtda.errors import RecordingError
from lightning_dtda.trajectory import Manifest, RunWriter, is_being_written, writer
from tests.trajectory.runs import manifest, records, write_run


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def test_a_file_counts_only_once_it_is_whole(directory, monkeypatch):
    seen = []
    write = writer.write_tensors

    def look_before_and_after(path, *arguments):
        before = len(Run(directory).manifest.shards)
        entry = write(path, *arguments)
        seen.append((before, len(Run(directory).manifest.shards), path.stat().st_size == entry["bytes"]))
        return entry

    monkeypatch.setattr(writer, "write_tensors", look_before_and_after)
    run_writer = RunWriter(directory, manifest(gradients="none"))
    for first in (0, 2, 4):
        run_writer.add_shard(first, first + 2, records(first, first + 2, None))
    run_writer.close("complete")

    assert seen == [(0, 0, True), (1, 1, True), (2, 2, True)]
    assert Run(directory).steps == 6


def test_the_caller_waits_only_when_too_many_files_are_under_way(directory, monkeypatch):
    disk = threading.Event()
    write = writer.write_tensors
    monkeypatch.setattr(writer, "write_tensors", lambda *arguments: disk.wait() and write(*arguments))
    run_writer = RunWriter(directory, manifest(gradients="none"))

    # the queue's length does not wait for a disk that does not answer; with the file being written, one more
    for step in range(writer._QUEUE_LENGTH):
        run_writer.add_shard(step, step + 1, records(step, step + 1, None))
    assert Run(directory).steps == 0
    disk.set()
    run_writer.close("complete")

    assert Run(directory).steps == writer._QUEUE_LENGTH


def test_a_training_that_waited_for_the_disk_is_written_through_the_cache(directory, monkeypatch):
    disk, started, added, direct = threading.Event(), threading.Event(), threading.Event(), []
    write = writer.write_tensors

    def note(path, tensors, past_the_cache):
        direct.append(past_the_cache)
        started.set()
        (disk if len(direct) == 1 else added).wait()
        return write(path, tensors, past_the_cache)

    monkeypatch.setattr(writer, "write_tensors", note)
    run_writer = RunWriter(directory, manifest(gradients="none"))
    run_writer.add_shard(0, 1, records(0, 1, None))
    started.wait()  # the others wait for the first one
    for step in range(1, 1 + writer._QUEUE_LENGTH):
        run_writer.add_shard(step, step + 1, records(step, step + 1, None))
    put = run_writer._queue.put
    monkeypatch.setattr(run_writer._queue, "put", lambda item: disk.set() or put(item))
    run_writer.add_shard(step + 1, step + 2, records(step + 1, step + 2, None))  # waits for a place
    added.set()
    run_writer.sync()
    run_writer.add_shard(step + 2, step + 3, records(step + 2, step + 3, None))
    run_writer.close("complete")

    # once no file is waiting, past the cache again
    assert direct == [True, *[False] * writer._QUEUE_LENGTH, True, True]


@pytest.mark.parametrize("fails", [False, True])
def test_a_shard_is_released_once_it_is_written_or_never_will_be(directory, monkeypatch, fails):
    disk, released = threading.Event(), threading.Event()

    def wait_for_the_disk(path, tensors, direct):
        disk.wait()
        if fails:
            raise OSError(5, "Input/output error")
        return write(path, tensors, direct)

    write = writer.write_tensors
    monkeypatch.setattr(writer, "write_tensors", wait_for_the_disk)
    run_writer = RunWriter(directory, manifest(gradients="none"))
    run_writer.add_shard(0, 1, records(0, 1, None), released.set)
    assert not released.is_set()
    disk.set()
    assert released.wait(60)

    with pytest.raises(RecordingError, match="failed") if fails else nullcontext():
        run_writer.close("complete")


def test_a_failed_write_is_reported_at_the_next_opportunity_and_nothing_after_it_counts(directory, monkeypatch):
    failing = threading.Event()
    write = writer.write_tensors

    def fail_at_the_second(path, *arguments):
        if path.name == "steps-00000001.safetensors":
            failing.set()
            raise OSError(5, "Input/output error")
        return write(path, *arguments)

    monkeypatch.setattr(writer, "write_tensors", fail_at_the_second)
    run_writer = RunWriter(directory, manifest(gradients="none"))
    with pytest.raises(RecordingError, match=f"Writing to {directory} failed.*Input/output error"):
        # never more than the queue's length ahead of the failure
        [run_writer.add_shard(step, step + 1, records(step, step + 1, None)) for step in range(10)]
    assert failing.is_set()
    with pytest.raises(RecordingError, match="choose another root"):
        run_writer.close("complete")

    run = Run(directory)
    assert (run.steps, run.manifest.status) == (1, "incomplete")
    assert run.manifest.reason == "writing failed: [Errno 5] Input/output error"


def test_the_manifest_is_rewritten_less_often_the_more_it_lists(directory, monkeypatch):
    rewritten = []
    save = Manifest.save

    def note(self, directory):
        rewritten.append(self.steps)
        save(self, directory)

    monkeypatch.setattr(Manifest, "save", note)
    run_writer = RunWriter(directory, manifest(gradients="none"))
    for step in range(200):
        run_writer.add_shard(step, step + 1, records(step, step + 1, None))
    run_writer.close("complete")

    # each of the first 64 files, every 2nd up to 128, every 3rd up to 192, ...; and at the end
    assert rewritten == [*range(65), *range(66, 129, 2), *range(131, 192, 3), *range(195, 201, 4), 200]
    assert Run(directory).steps == 200


def test_closing_waits_until_everything_is_on_disk(tmp_path):
    run = write_run(tmp_path / "run").run

    named = {entry["file"] for entry in run.manifest.files}
    assert {path.name for path in run.path.iterdir()} == {"manifest.json", *named}
    assert not [thread for thread in threading.enumerate() if thread.name == "lightning-dtda-writer"]


def test_a_discarded_run_leaves_nothing(directory):
    run_writer = RunWriter(directory, manifest())
    run_writer.add_checkpoint(0, {"parameters.weight": torch.zeros(3, 2)})

    run_writer.discard()

    assert not directory.exists()
    assert not [thread for thread in threading.enumerate() if thread.name == "lightning-dtda-writer"]


def test_a_run_is_locked_while_it_is_written(directory):
    assert not is_being_written(directory)
    run_writer = RunWriter(directory, manifest())
    assert is_being_written(directory)
    run_writer.close("complete")
    assert not is_being_written(directory)
    # a process that was killed leaves the file, not the lock
    (directory / "recording.lock").touch()
    assert not is_being_written(directory)
