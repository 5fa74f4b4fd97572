"""A ground truth on disk, training by training, so that a crash loses none that was finished."""

from __future__ import annotations

import uuid
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from filelock import FileLock
from torch import Tensor

from lightning_dtda.errors import RetrainingError, TrajectoryError
from lightning_dtda.retraining.task import Task
from lightning_dtda.trajectory.answers import Answers
from lightning_dtda.trajectory.storage import read_json, read_tensors, replace_file, write_json

FORMAT_VERSION = 1
_INDEX, _LOCK = "truth.json", ".truth.lock"
_OWN = (_LOCK, f".{_INDEX}.partial")
"""What is there before the first index is: of another process that is about to write it, or was killed then."""

_ANSWERS = Answers(_INDEX, "ground truth", "retrain", FORMAT_VERSION, RetrainingError, ignored=_OWN)
_ALL_DATA = -1
"""Stands for the subset of a training on everything."""

_OF_CALLS = ("engine", "failures", "versions")
"""What ``about`` says of the calls that were made, and which is no part of the question."""


class TruthStore:
    """A directory with ``truth.json`` and a safetensors file for each batch of finished trainings.

    Each file holds ``subsets`` ``(trainings,)``, positions in the index's list or -1 for a training on everything,
    ``seeds`` ``(trainings,)`` and ``measurements`` ``(trainings, queries)``. Its name ends with its checksum, so that
    processes that write at the same time need no list of files between them. The index says what is asked; it only
    grows, and is changed under a lock.

    Args:
        path: The directory.
        index: The content of ``truth.json``.
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
        """Start a store, or go on with one of the same question; subsets and seeds may be other ones, which are added.

        Args:
            path: The directory.
            about: What is trained and measured.
            queries: What the queries are called.
            removed: The subsets.
            seeds: Their seeds.
            baseline_seeds: Those of the trainings on everything.
            overwrite: Whether the answer to another question is replaced.

        Raises:
            RetrainingError: If the directory holds a ground truth of another question, or something else.
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
        """Say whether a directory holds a ground truth, finished or not."""
        return _ANSWERS.is_at(path)

    @classmethod
    def open(cls, path: str | Path) -> TruthStore:
        """Open a stored ground truth.

        Raises:
            TrajectoryError: If there is none, or it is of an unknown format.
        """
        path = Path(path)
        return cls(path, _ANSWERS.read(path))

    @property
    def about(self) -> dict[str, Any]:
        """What was trained and measured, by which engines, and which trainings failed why."""
        return {
            **self._index["about"],
            "engine": ", ".join(self._index["engine"]),
            "failures": list(self._index["failures"]),
            "versions": dict(self._index["versions"]),
        }

    @property
    def queries(self) -> tuple[int, ...]:
        """What the queries are called."""
        return tuple(self._index["queries"])

    @property
    def removed(self) -> tuple[tuple[int, ...], ...]:
        """All subsets that were ever asked for."""
        return tuple(map(tuple, self._index["removed"]))

    @property
    def seeds(self) -> tuple[int, ...]:
        """All seeds that were ever asked for."""
        return tuple(self._index["seeds"])

    @property
    def baseline_seeds(self) -> tuple[int, ...]:
        """All seeds that were ever asked for on everything."""
        return tuple(self._index["baseline_seeds"])

    def add(self, tasks: Sequence[Task], measurements: Tensor) -> None:
        """Write finished trainings.

        Args:
            tasks: Which; subsets by their positions in :attr:`removed`.
            measurements: ``(trainings, queries)``.

        Raises:
            RetrainingError: If the file cannot be written.
        """
        tensors = {
            "subsets": torch.tensor([_ALL_DATA if task.subset is None else task.subset for task in tasks]),
            "seeds": torch.tensor([task.seed for task in tasks]),
            "measurements": measurements.detach().cpu().contiguous(),
        }
        content = safetensors.torch.save(tensors)
        # two processes that train the same must not write into one another's file: hence a random part
        name = f"trainings-{uuid.uuid4().hex[:12]}-{zlib.crc32(content):08x}.safetensors"
        try:
            replace_file(self.path / name, content)
        except OSError as error:
            raise RetrainingError(
                f"{self.path} cannot be written ({error}). Free some disk, then call again: what is there counts."
            ) from error

    def note(self, engine: str, failures: Mapping[Task, str]) -> None:
        """Write down which engine trained, and what went wrong."""
        with self._changed() as index:
            index["engine"] = list(dict.fromkeys([*index["engine"], engine]))
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
            TrajectoryError: If a file is damaged, naming it.
        """
        found: dict[Task, Tensor] = {}
        for path in sorted(self.path.glob("trainings-*.safetensors")):
            checksum = path.stem.rpartition("-")[2]
            entry = {"file": path.name, "bytes": path.stat().st_size, "crc32": int(checksum, 16)}
            try:
                tensors = read_tensors(self.path, entry)
            except TrajectoryError as error:
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
        """Read some trainings.

        Args:
            removed: Some of :attr:`removed`.
            seeds: Some of the seeds.
            baseline_seeds: Some of the seeds on everything.

        Returns:
            Measurements ``(subsets, seeds, queries)`` and those on everything ``(baseline_seeds, queries)``, NaN where
            there are none.
        """
        return gather(self.finished(), self.positions(removed), seeds, baseline_seeds, len(self.queries))

    def positions(self, removed: Sequence[Sequence[int]]) -> list[int]:
        """Return where subsets stand in :attr:`removed`."""
        known = {subset: position for position, subset in enumerate(self.removed)}
        return [known[tuple(subset)] for subset in removed]

    @contextmanager
    def _changed(self) -> Iterator[dict[str, Any]]:
        with FileLock(self.path / _LOCK):
            self._index = read_json(self.path / _INDEX)
            yield self._index
            write_json(self.path / _INDEX, self._index)


def gather(
    finished: Mapping[Task, Tensor],
    subsets: Sequence[int],
    seeds: Sequence[int],
    baseline_seeds: Sequence[int],
    queries: int,
) -> tuple[Tensor, Tensor]:
    """Put measurements of single trainings together, NaN where one is missing.

    Args:
        finished: Measurements ``(queries,)``.
        subsets: Positions of the subsets.
        seeds: Their seeds.
        baseline_seeds: Those on everything.
        queries: Q.

    Returns:
        ``(subsets, seeds, queries)`` and ``(baseline_seeds, queries)``.
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
    before, after = found.get("about", {}), wanted["about"]
    names = [key for key in {**before, **after} if before.get(key) != after.get(key) and key != "runs"]
    # more recorded runs are more seeds; another run under the same name is another question
    if any(after.get("runs", {}).get(run, checksum) != checksum for run, checksum in before.get("runs", {}).items()):
        names.append("runs")
    return names + [key for key in ("format_version", "queries") if found.get(key) != wanted[key]]
