"""An attribution on disk, part by part, so that a crash loses none that is finished."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Self, override

from lightning_dtda.attribution.responses import StoredResponses, StoredTable
from lightning_dtda.attribution.trust import chaotic
from lightning_dtda.errors import AttributionError, TrajectoryError
from lightning_dtda.trajectory.answers import Answers

OF_RUNS = ("drift", "adjoint_norms", "diagnosis", "response_norm", "largest_response")
"""What ``about`` says of each run."""

FORMAT_VERSION = 2
_ANSWERS = Answers("attribution.json", "attribution", "attribute", FORMAT_VERSION, AttributionError)


class Store:
    """A directory with ``attribution.json`` and a safetensors file for each finished part of an answer.

    The index is rewritten after each part and lists only what is on disk.

    Args:
        path: The directory.
        index: The content of ``attribution.json``.
    """

    parts: ClassVar[str]
    """What the index calls the parts."""

    def __init__(self, path: Path, index: dict[str, Any]) -> None:
        self.path = path
        self._index = index

    @classmethod
    def create(
        cls,
        path: str | Path,
        about: Mapping[str, Any],
        queries: Sequence[int],
        removals: int,
        wanted: Mapping[str, int | None],
        overwrite: bool = False,
    ) -> Self:
        """Start a store, or go on with one that was started for the same question.

        Args:
            path: The directory.
            about: What is asked and how, with the removals and the step.
            queries: What the queries are called.
            removals: K.
            wanted: Names of the runs that are asked, each with its checksum.
            overwrite: Whether an answer to another question is replaced.

        Raises:
            AttributionError: If the directory holds an answer to another question, or something else.
        """
        path = Path(path)
        index: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "about": {key: value for key, value in about.items() if key not in (*OF_RUNS, "chaotic")},
            "queries": list(queries),
            "removals": removals,
            "wanted": dict(wanted),
            cls.parts: {},
        }
        with _ANSWERS.opened(path):
            found = _ANSWERS.found(path, overwrite)
            if found.get("runs") or found.get("blocks"):
                _ANSWERS.check_same(path, cls._changes(found, index))
                index |= {key: found[key] for key in (cls.parts, "trusted") if key in found}
            _ANSWERS.write(path, index)
            for left in path.glob("scratch-*") if overwrite else ():
                shutil.rmtree(left)
            if not index[cls.parts]:  # left over from an answer that is replaced; only now, when no index names them
                for file in path.glob("*.safetensors"):
                    file.unlink()
        return cls(path, index)

    @staticmethod
    def is_at(path: str | Path) -> bool:
        """Say whether a directory holds an attribution, finished or not."""
        return _ANSWERS.is_at(path)

    @property
    def queries(self) -> tuple[int, ...]:
        """What the queries are called, those included that are not answered yet."""
        return tuple(self._index["queries"])

    @classmethod
    def _changes(cls, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
        """Name what another question is about."""
        before, after = found.get("about", {}), wanted["about"]
        names = [key for key in {**before, **after} if before.get(key) != after.get(key)]
        names += [key for key in ("format_version", "queries", "removals") if found.get(key) != wanted[key]]
        if not cls._goes_on(found.get("wanted", {}), wanted["wanted"]):
            names.append("runs")
        return list(dict.fromkeys(names))

    @staticmethod
    def _goes_on(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
        """Whether an answer of some runs is a part of that of others."""
        return before == after

    def _add(self, part: str, entry: dict[str, Any]) -> None:
        self._index[self.parts][part] = entry
        _ANSWERS.write(self.path, self._index)


class AttributionStore(Store):
    """An answer run by run: more runs may be wanted than the last time, but none may be another of the same name.

    Each file holds ``baseline`` ``(queries,)``, ``responses`` ``(queries, removals)`` and, of each query's responses,
    ``checksums`` ``(queries,)``.
    """

    parts: ClassVar[str] = "runs"

    @property
    def about(self) -> dict[str, Any]:
        """What was asked and how it was answered, with what is known of each run, and which are chaotic."""
        return with_runs(self._index["about"], self._index["runs"])

    @property
    def finished(self) -> tuple[str, ...]:
        """Names of the runs whose responses are on disk."""
        return tuple(sorted(self._index["runs"]))

    @property
    def unfinished(self) -> tuple[str, ...]:
        """Names of the runs that were meant to be added and are not there yet."""
        return tuple(name for name in self._index["wanted"] if name not in self._index["runs"])

    def add(self, run: str, baseline: Tensor, responses: Tensor, facts: Mapping[str, Any]) -> None:
        """Write a run's answer.

        Args:
            run: Its name.
            baseline: m(theta_T) ``(queries,)``.
            responses: ``(queries, removals)``.
            facts: What ``about`` says of it, :data:`OF_RUNS`.
        """
        entry = StoredTable.write(self.path / f"{run}.safetensors", "responses", responses, {"baseline": baseline})
        self._add(run, entry | {key: facts[key] for key in OF_RUNS})

    def read(self) -> tuple[Tensor, StoredResponses]:
        """Read baseline ``(runs, queries)``, and map responses ``(runs, queries, removals)``, of the finished runs.

        Raises:
            TrajectoryError: If no run is finished, or a file is damaged.
        """
        if not self.finished:
            raise TrajectoryError(f"{self.path} holds no finished run. Call attribute again with this output.")
        entries = [self._index["runs"][run] for run in self.finished]
        runs = [StoredTable.map(self.path, entry, "responses", ["baseline"]) for entry in entries]
        return torch.stack([run.others["baseline"] for run in runs]), StoredResponses(runs)

    @staticmethod
    @override
    def _goes_on(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
        return before.items() <= after.items()


def read_index(path: str | Path) -> dict[str, Any]:
    """Return the index of a stored attribution: it has ``runs``, or ``blocks`` of queries.

    Raises:
        TrajectoryError: If there is none, or it is of an unknown format.
    """
    return _ANSWERS.read(Path(path))


def with_runs(about: Mapping[str, Any], facts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return what is said of an answer, with the facts of each run, and which runs are chaotic."""
    of_runs = {key: {run: facts[run][key] for run in sorted(facts)} for key in OF_RUNS}
    return {**about, **of_runs, "chaotic": chaotic(of_runs["response_norm"])}


def warn_unfinished(path: str | Path, what: str, missing: Sequence[str]) -> None:
    """Warn about what an interrupted attribution lacks, if anything."""
    if missing:
        warnings.warn(
            f"{path} is unfinished: {len(missing)} {what} are missing ({', '.join(missing)}). Call attribute "
            "again with the same output to continue.",
            stacklevel=3,
        )
