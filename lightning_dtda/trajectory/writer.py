"""Writes a run outside the training thread: first complete files, then the manifest that lists them."""

from __future__ import annotations

import queue
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor

from lightning_dtda.errors import DiskSpaceError, RecordingError
from lightning_dtda.trajectory.example_checksums import ExampleChecksums
from lightning_dtda.trajectory.manifest import AVERAGE, EXAMPLES, Manifest, Status
from lightning_dtda.trajectory.storage import is_disk_full, write_tensors

_QUEUE_LENGTH = 2
"""Number of files that may wait in memory. With one more, the training waits for the disk, which bounds the memory."""

FILES_IN_MEMORY = _QUEUE_LENGTH + 2
"""Number of files of a run that may be in memory: one being filled, one being written, and those that wait."""

_LISTED_FILES_PER_NEW = 64
"""Number of listed files per new file at which the manifest is rewritten. This keeps the cost of rewriting constant per
file, and a killed training loses at most 1/64 of its files (none if it has fewer than 64)."""


_LOCK = "recording.lock"
"""File that is locked while a run is written; the system releases the lock when the process ends, even by a crash."""


class RunWriter:
    """Accepts the checkpoints and shards of one run, in order, and writes them in a separate thread.

    The manifest is rewritten as files are added and lists only what is on disk, so a killed training leaves a readable
    prefix.

    Args:
        directory: Run directory, which must exist.
        manifest: Manifest of the run, with status ``recording``; from here on it belongs to the writer. For a resumed
            run, it lists the files to keep.
    """

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self._directory = directory
        self._manifest = manifest
        self._queue: queue.Queue[tuple[str, dict[str, Any], Mapping[str, Tensor], Callable[[], None] | None] | None]
        self._queue = queue.Queue(_QUEUE_LENGTH)
        self._failure: Exception | None = None
        self._is_late = False
        """Whether the training had to wait for the disk."""
        self._lock = FileLock(directory / _LOCK)
        self._lock.acquire(timeout=0)
        manifest.save(directory)
        kept = {entry["file"] for entry in manifest.files}
        for path in directory.glob("*.safetensors"):
            if path.name not in kept:
                path.unlink()
        self._thread = threading.Thread(target=self._work, name="lightning-dtda-writer", daemon=True)
        self._thread.start()

    def add_checkpoint(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Queue parameters and optimizer state after ``step`` steps. The tensors must not change afterwards."""
        self._put(f"checkpoint-{step:08d}.safetensors", {"step": step}, tensors)

    def add_shard(
        self,
        first_step: int,
        last_step: int,
        tensors: Mapping[str, Tensor],
        release: Callable[[], None] | None = None,
    ) -> None:
        """Queue the records of steps ``first_step`` to ``last_step - 1``.

        Args:
            first_step: First step.
            last_step: Step after the last one.
            tensors: Records, which must not change before they are released.
            release: Callback, run in the writer's thread once the tensors are no longer needed.
        """
        entry = {"first_step": first_step, "last_step": last_step}
        self._put(f"steps-{first_step:08d}.safetensors", entry, tensors, release)

    def add_examples(self, checksums: ExampleChecksums) -> None:
        """Queue the checksums of the training examples."""
        self._put(EXAMPLES, {}, checksums.tensors())

    def add_average(self, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Queue the averaged parameters that the training ended with."""
        self._put(AVERAGE, dict(facts), tensors)

    def add_metrics(self, metrics: Mapping[str, float]) -> None:
        """Note what the training logged, for the manifest that closes the run."""
        self._manifest.metrics = dict(metrics)

    def sync(self) -> None:
        """Wait until everything added so far is on disk and listed."""
        self._queue.join()
        self._save_manifest()
        self._raise_failure()

    def close(self, status: Status, reason: str | None = None) -> None:
        """Wait until everything is on disk, then write to the manifest how the run ended.

        Raises:
            RecordingError: If a file could not be written, a :class:`~lightning_dtda.errors.DiskSpaceError` if the disk
                is full; the manifest records this too.
        """
        self._queue.put(None)
        self._thread.join()
        if self._failure is not None:
            status, reason = "incomplete", f"writing failed: {self._failure}"
        self._manifest.status, self._manifest.reason = status, reason
        self._save_manifest()
        self._unlock()
        self._raise_failure()

    def discard(self) -> None:
        """Stop writing and delete the run."""
        self._queue.put(None)
        self._thread.join()
        self._unlock()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _save_manifest(self) -> None:
        try:
            self._manifest.save(self._directory)
        except OSError as error:
            self._failure = self._failure or error

    def _unlock(self) -> None:
        self._lock.release()
        (self._directory / _LOCK).unlink(missing_ok=True)

    def _put(
        self,
        name: str,
        entry: dict[str, Any],
        tensors: Mapping[str, Tensor],
        release: Callable[[], None] | None = None,
    ) -> None:
        self._raise_failure()
        self._is_late = self._is_late or self._queue.full()
        self._queue.put((name, entry, tensors, release))

    def _raise_failure(self) -> None:
        if self._failure is not None:
            kind = DiskSpaceError if is_disk_full(self._failure) else RecordingError
            raise kind(
                f"Writing to {self._directory} failed: {self._failure}. Free disk space or choose another root, then "
                "record the run again."
            ) from self._failure

    def _work(self) -> None:
        unlisted = 0
        while (item := self._queue.get()) is not None:
            name, entry, tensors, release = item
            try:
                if self._failure is not None:
                    continue  # keep emptying the queue, so the training thread never blocks on it
                # a training that waited for the disk does not wait again: until no file is waiting, all go through the
                # page cache, which is faster, but takes several times the CPU time
                self._is_late = self._is_late and not self._queue.empty()
                written: Any = {**write_tensors(self._directory / name, tensors, not self._is_late), **entry}
                if name == EXAMPLES:
                    self._manifest.examples = written
                elif name == AVERAGE:
                    self._manifest.average = written
                elif "step" in entry:
                    self._manifest.checkpoints.append(written)
                else:
                    self._manifest.shards.append(written)
                    self._manifest.steps = entry["last_step"]
                unlisted += 1
                if unlisted * _LISTED_FILES_PER_NEW >= len(self._manifest.checkpoints) + len(self._manifest.shards):
                    self._manifest.save(self._directory)
                    unlisted = 0
            except Exception as error:
                self._failure = error
            finally:
                if release is not None:
                    release()
                self._queue.task_done()


def is_being_written(directory: Path) -> bool:
    """Return whether this or another process is currently writing a run."""
    if not (directory / _LOCK).exists():
        return False
    try:
        with FileLock(directory / _LOCK, timeout=0):
            return False
    except Timeout:
        return True
    except OSError as error:
        raise RecordingError(
            f"{directory / _LOCK} cannot be locked ({error}). Delete it if nothing records there."
        ) from error
