"""A ground truth on disk, stored training by training, so a crash loses no finished training."""

from __future__ import annotations

import uuid
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from filelock import FileLock
from torch import Tensor
from typing_extensions import TypedDict

from lightning_dtda.errors import RetrainingError, TrajectoryError
from lightning_dtda.retraining.task import Task
from lightning_dtda.trajectory.answers import Answers
from lightning_dtda.trajectory.schema import FLOATS, INT64, Count, Expected, FileEntry, check_tensors
from lightning_dtda.trajectory.storage import read_tensors, replace_file

FORMAT_VERSION = 1
_INDEX, _LOCK = "truth.json", ".truth.lock"
_OWN = (_LOCK, f".{_INDEX}.partial")
"""Files that may exist before the first index, from a process that is about to write it or was killed before."""


class Failure(TypedDict):
    """A training that failed."""

    subset: Count | None
    seed: Count
    reason: str


class About(TypedDict, total=False):
    """Description of a ground truth. It may have more entries; none of these has to be there."""

    removal: Literal["drop", "reweight"]
    data: dict[str, Any]
    runs: dict[str, Count]
    failures: list[Failure]
    versions: dict[str, str]


class _Index(TypedDict):
    """``truth.json``."""

    about: About
    queries: list[int]
    removed: list[list[Count]]
    seeds: list[Count]
    baseline_seeds: list[Count]
    engine: list[str]
    failures: list[Failure]
    versions: dict[str, str]


_ANSWERS = Answers(_INDEX, "ground truth", "retrain", FORMAT_VERSION, _Index, RetrainingError, ignored=_OWN)
_TRAININGS: dict[str, Expected] = {
    "subsets": (INT64, ("trainings",)),
    "seeds": (INT64, ("trainings",)),
    "measurements": (FLOATS, ("trainings", "queries")),
}
"""Tensors in a file of finished trainings."""

_ALL_DATA = -1
"""Stored in place of the subset for a training on all examples."""

_OF_CALLS = ("engine", "failures", "versions")
"""Entries of ``about`` that describe the calls and are not part of the question."""


class TruthStore:
    """A directory with ``truth.json`` and a safetensors file for each batch of finished trainings.

    Each file holds ``subsets`` ``(trainings,)`` (positions in the index's list, or -1 for a training on all examples),
    ``seeds`` ``(trainings,)`` and ``measurements`` ``(trainings, queries)``. Its name ends with its checksum, so
    processes that write at the same time need no shared list of files. The index says what was asked; it only grows,
    and is changed under a lock.

    Args:
        path: The directory.
        index: Content of ``truth.json``.
    """

    def __init__(self, path: Path, index: dict[str, Any]) -> None:
        self.path = path
        self._index = index

    @classmethod
    def create(
        cls,
        path: str | Path,
        about: Mapping[str, Any],
        queries: Sequence[int],
        removed: Sequence[Sequence[int]],
        seeds: Sequence[int],
        baseline_seeds: Sequence[int],
        overwrite: bool = False,
    ) -> TruthStore:
        """Create a store, or continue one for the same question; new subsets and seeds are added.

        Args:
            path: The directory.
            about: What is trained and measured.
            queries: Names of the queries.
            removed: Subsets to remove.
            seeds: Seeds of the trainings with removed subsets.
            baseline_seeds: Seeds of the trainings on all examples.
            overwrite: Whether to replace the answer to another question.

        Raises:
            RetrainingError: If the directory holds a ground truth for another question, or anything else.
        """
        path = Path(path)
        index: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "about": {key: value for key, value in about.items() if key not in _OF_CALLS},
            "queries": list(queries),
            "removed": [list(subset) for subset in removed],
            "seeds": list(seeds),
            "baseline_seeds": list(baseline_seeds),
            "engine": [engine for engine in str(about.get("engine", "")).split(", ") if engine],
            "failures": list(about.get("failures", ())),
            "versions": dict(about.get("versions", {})),
        }
        with _ANSWERS.opened(path), FileLock(path / _LOCK):
            if found := _ANSWERS.found(path, overwrite):
                _ANSWERS.check_same(path, _changes(found, index))
                for key in ("removed", "seeds", "baseline_seeds", "engine"):
                    found[key] += [one for one in index[key] if one not in found[key]]
                if "runs" in found["about"]:
                    found["about"]["runs"] |= index["about"]["runs"]
                index = found
            else:
                for file in path.glob("trainings-*.safetensors"):
                    file.unlink()
            _ANSWERS.write(path, index)
        return cls(path, index)

    @staticmethod
    def is_at(path: str | Path) -> bool:
        """Return whether a directory holds a ground truth, finished or not."""
        return _ANSWERS.is_at(path)

    @classmethod
    def open(cls, path: str | Path) -> TruthStore:
        """Open a stored ground truth.

        Raises:
            TrajectoryError: If there is none, or its format is unknown.
        """
        path = Path(path)
        return cls(path, _ANSWERS.read(path))

    @property
    def about(self) -> dict[str, Any]:
        """What was trained and measured, the engines that trained, and the trainings that failed, with reasons."""
        return {
            **self._index["about"],
            "engine": ", ".join(self._index["engine"]),
            "failures": list(self._index["failures"]),
            "versions": dict(self._index["versions"]),
        }

    @property
    def queries(self) -> tuple[int, ...]:
        """Names of the queries."""
        return tuple(self._index["queries"])

    @property
    def removed(self) -> tuple[tuple[int, ...], ...]:
        """All subsets that were ever requested."""
        return tuple(map(tuple, self._index["removed"]))

    @property
    def seeds(self) -> tuple[int, ...]:
        """All seeds that were ever requested for trainings with removed subsets."""
        return tuple(self._index["seeds"])

    @property
    def baseline_seeds(self) -> tuple[int, ...]:
        """All seeds that were ever requested for trainings on all examples."""
        return tuple(self._index["baseline_seeds"])

    def add(self, tasks: Sequence[Task], measurements: Tensor) -> None:
        """Write finished trainings.

        Args:
            tasks: The trainings, with subsets given by their positions in :attr:`removed`.
            measurements: Measurements ``(trainings, queries)``.

        Raises:
            RetrainingError: If the file cannot be written.
        """
        tensors = {
            "subsets": torch.tensor([_ALL_DATA if task.subset is None else task.subset for task in tasks]),
            "seeds": torch.tensor([task.seed for task in tasks]),
            "measurements": measurements.detach().cpu().contiguous(),
        }
        content = safetensors.torch.save(tensors)
        # a random part, so two processes with the same training do not write to the same file
        name = f"trainings-{uuid.uuid4().hex[:12]}-{zlib.crc32(content):08x}.safetensors"
        with _ANSWERS.written(self.path):
            replace_file(self.path / name, content)

    def note(self, engines: Sequence[str], failures: Mapping[Task, str]) -> None:
        """Store which engines trained, and which trainings failed.

        Raises:
            RetrainingError: If the index cannot be written.
        """
        with self._changed() as index:
            index["engine"] = list(dict.fromkeys([*index["engine"], *engines]))
            finished = self.finished()
            known = {Task(entry["subset"], entry["seed"]): entry["reason"] for entry in index["failures"]}
            known.update(failures)
            index["failures"] = [
                {"subset": task.subset, "seed": task.seed, "reason": reason}
                for task, reason in known.items()
                if task not in finished
            ]

    def finished(self) -> dict[Task, Tensor]:
        """Read the measurements ``(queries,)`` of each finished training.

        Raises:
            TrajectoryError: If a file is damaged; the message names it.
        """
        found: dict[Task, Tensor] = {}
        for path in sorted(self.path.glob("trainings-*.safetensors")):
            checksum = path.stem.rpartition("-")[2]
            try:
                entry: FileEntry = {"file": path.name, "bytes": path.stat().st_size, "crc32": int(checksum, 16)}
                tensors = read_tensors(self.path, entry)
                check_tensors(tensors, _TRAININGS, path, {"queries": len(self.queries)})
            except (TrajectoryError, OSError, ValueError) as error:
                raise TrajectoryError(
                    f"{path} was altered or damaged. Delete it and retrain again; only its trainings are repeated."
                ) from error
            numbers = tensors["subsets"].tolist(), tensors["seeds"].tolist()
            for subset, seed, values in zip(*numbers, tensors["measurements"], strict=True):
                found[Task(None if subset == _ALL_DATA else subset, seed)] = values
        return found

    def read(
        self, removed: Sequence[Sequence[int]], seeds: Sequence[int], baseline_seeds: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Read the measurements of some trainings.

        Args:
            removed: Some of the subsets in :attr:`removed`.
            seeds: Some of the seeds in :attr:`seeds`.
            baseline_seeds: Some of the seeds in :attr:`baseline_seeds`.

        Returns:
            Measurements ``(subsets, seeds, queries)`` and baseline ``(baseline_seeds, queries)``, NaN if missing.
        """
        return gather(self.finished(), self.positions(removed), seeds, baseline_seeds, len(self.queries))

    def positions(self, removed: Sequence[Sequence[int]]) -> list[int]:
        """Return the positions of subsets in :attr:`removed`."""
        known = {subset: position for position, subset in enumerate(self.removed)}
        return [known[tuple(subset)] for subset in removed]

    @contextmanager
    def _changed(self) -> Iterator[dict[str, Any]]:
        with _ANSWERS.written(self.path), FileLock(self.path / _LOCK):
            self._index = _ANSWERS.read(self.path)
            yield self._index
            _ANSWERS.write(self.path, self._index)


def gather(
    finished: Mapping[Task, Tensor],
    subsets: Sequence[int],
    seeds: Sequence[int],
    baseline_seeds: Sequence[int],
    queries: int,
) -> tuple[Tensor, Tensor]:
    """Combine the measurements of single trainings, with NaN for missing ones.

    Args:
        finished: Measurements ``(queries,)`` of finished trainings.
        subsets: Positions of the subsets.
        seeds: Seeds of the trainings with removed subsets.
        baseline_seeds: Seeds of the trainings on all examples.
        queries: Q, the number of queries.

    Returns:
        Measurements ``(subsets, seeds, queries)`` and baseline ``(baseline_seeds, queries)``.
    """
    missing = torch.full((queries,), torch.nan, dtype=next(iter(finished.values())).dtype if finished else None)
    rows = [finished.get(Task(subset, seed), missing) for subset in subsets for seed in seeds]
    baseline = [finished.get(Task(None, seed), missing) for seed in baseline_seeds]
    measurements = torch.stack(rows) if rows else missing.new_empty(0, queries)
    return (
        measurements.reshape(len(subsets), len(seeds), queries),
        torch.stack(baseline) if baseline else missing.new_empty(0, queries),
    )


def _changes(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    before, after = found["about"], wanted["about"]
    names = [key for key in {**before, **after} if before.get(key) != after.get(key) and key != "runs"]
    # additional recorded runs are additional seeds, but a different run with the same name is a different question
    if any(after.get("runs", {}).get(run, checksum) != checksum for run, checksum in before.get("runs", {}).items()):
        names.append("runs")
    return names + (["queries"] if found["queries"] != wanted["queries"] else [])
