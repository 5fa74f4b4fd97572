"""An attribution on disk, run by run, so that a crash loses no finished run."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_dtda.attribution.responses import StoredResponses, StoredTable
from lightning_dtda.attribution.trust import chaotic
from lightning_dtda.errors import AttributionError, TrajectoryError
from lightning_dtda.trajectory.answers import Answers

OF_RUNS = ("drift", "adjoint_norms", "diagnosis", "response_norm", "largest_response")
"""What ``about`` says of each run."""

FORMAT_VERSION = 2
_ANSWERS = Answers("attribution.json", "attribution", "attribute", FORMAT_VERSION, AttributionError)


class AttributionStore:
    """A directory with ``attribution.json`` and a safetensors file for each finished run.

    Each file holds ``baseline`` ``(queries,)``, ``responses`` ``(queries, removals)`` and, of each query's responses,
    ``checksums`` ``(queries,)``. The index is rewritten after each run and lists only what is on disk.

    Args:
        path: The directory.
        index: The content of ``attribution.json``.
    """

    def __init__(self, path: Path, index: dict[str, Any]) -> None:
        self.path = path
        self._index = index

    @classmethod
    def create(
        cls,
        path: str | Path,
        about: dict[str, Any],
        queries: Sequence[int],
        removals: int,
        wanted: Mapping[str, int | None],
        overwrite: bool = False,
    ) -> AttributionStore:
        """Start a store, or go on with one that was started for the same question.

        Args:
            path: The directory.
            about: What is asked and how, with the removals and the step.
            queries: What the queries are called.
            removals: K.
            wanted: Names of the runs that will be added, each with its checksum; more may be wanted than the last
                time, but none may be another one under the same name.
            overwrite: Whether an answer to another question is replaced.

        Raises:
            AttributionError: If the directory holds an answer to another question, or something else.
        """
        return cls(Path(path), started(Path(path), about, queries, removals, wanted, overwrite, "runs"))

    @staticmethod
    def is_at(path: str | Path) -> bool:
        """Say whether a directory holds an attribution, finished or not."""
        return _ANSWERS.is_at(path)

    @property
    def about(self) -> dict[str, Any]:
        """What was asked and how it was answered, with what is known of each run, and which are chaotic."""
        return with_runs(self._index["about"], self._index["runs"])

    @property
    def queries(self) -> tuple[int, ...]:
        """What the queries are called."""
        return tuple(self._index["queries"])

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
        self._index["runs"][run] = entry | {key: facts[key] for key in OF_RUNS}
        write_index(self.path, self._index)

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


def started(
    path: Path,
    about: Mapping[str, Any],
    queries: Sequence[int],
    removals: int,
    wanted: Mapping[str, int | None],
    overwrite: bool,
    parts: Literal["runs", "blocks"],
) -> dict[str, Any]:
    """Start a directory for the answer to a question, or go on with one, and return its index.

    Args:
        path: As for :meth:`AttributionStore.create`, as all but the last.
        about: What is asked.
        queries: What the queries are called.
        removals: K.
        wanted: The runs.
        overwrite: Whether another answer is replaced.
        parts: What the answer is stored in.

    Raises:
        AttributionError: As there.
    """
    index: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "about": {key: value for key, value in about.items() if key not in (*OF_RUNS, "chaotic")},
        "queries": list(queries),
        "removals": removals,
        "wanted": dict(wanted),
        parts: {},
    }
    with _ANSWERS.opened(path):
        found = _ANSWERS.found(path, overwrite)
        if found.get("runs") or found.get("blocks"):
            _ANSWERS.check_same(path, _changes(found, index))
            index |= {key: found[key] for key in (parts, "trusted") if key in found}
        _ANSWERS.write(path, index)
        for left in path.glob("scratch-*") if overwrite else ():
            shutil.rmtree(left)
        if not index[parts]:  # left over from an answer that is replaced; only now, when no index names them
            for file in path.glob("*.safetensors"):
                file.unlink()
    return index


def read_index(path: str | Path) -> dict[str, Any]:
    """Return the index of a stored attribution: it has ``runs``, or ``blocks`` of queries.

    Raises:
        TrajectoryError: If there is none, or it is of an unknown format.
    """
    return _ANSWERS.read(Path(path))


def write_index(path: Path, index: dict[str, Any]) -> None:
    """Write the index of a stored attribution."""
    _ANSWERS.write(path, index)


def with_runs(about: Mapping[str, Any], facts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return what is said of an answer, with the facts of each run, and which runs are chaotic."""
    of_runs = {key: {run: facts[run][key] for run in sorted(facts)} for key in OF_RUNS}
    return {**about, **of_runs, "chaotic": chaotic(of_runs["response_norm"])}


def _changes(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    before, after = found.get("about", {}), wanted["about"]
    names = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    names += [key for key in ("format_version", "queries", "removals") if found.get(key) != wanted[key]]
    before, after = found.get("wanted", {}), wanted["wanted"]
    if before != after if "blocks" in wanted else not before.items() <= after.items():
        names.append("runs")
    return list(dict.fromkeys(names))
