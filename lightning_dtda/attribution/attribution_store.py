"""An attribution on disk, stored part by part: a crash loses no finished part."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Self, override

from lightning_dtda.attribution.about import Index
from lightning_dtda.attribution.gallery import Gallery
from lightning_dtda.attribution.gallery.store import GALLERY, write_gallery
from lightning_dtda.attribution.responses import StoredResponses, StoredTable
from lightning_dtda.attribution.trust import chaotic
from lightning_dtda.errors import AttributionError, TrajectoryError
from lightning_dtda.trajectory.answers import Answers
from lightning_dtda.trajectory.schema import FLOATS, Expected

BESIDE = (GALLERY, "check.json", "command.json")
"""Files beside an attribution that are about it, and deleted with it."""

OF_RUNS = ("drift", "adjoint_norms", "diagnosis", "response_norm", "largest_response")
"""Keys of ``about`` that have a value for each run."""

FORMAT_VERSION = 3
_ANSWERS = Answers("attribution.json", "attribution", "attribute", FORMAT_VERSION, Index, AttributionError)


class Store:
    """A directory with ``attribution.json`` and a safetensors file for each finished part of an attribution.

    The index is rewritten after each part and lists only parts that are on disk.

    Args:
        path: Directory of the attribution.
        index: Content of ``attribution.json``.
    """

    parts: ClassVar[str]
    """Key of the parts in the index."""

    _free: ClassVar[tuple[str, ...]] = ()
    """Settings that the stored parts do not depend on, so that a finished answer may change them."""

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
        """Start a store, or continue one that was started for the same question.

        Args:
            path: Directory of the attribution.
            about: Description of the question, with the removals and the step.
            queries: Names of the queries.
            removals: Number of removals, K.
            wanted: Names of the runs to attribute, each with its checksum.
            overwrite: Whether to replace the answer to another question.

        Raises:
            AttributionError: If the directory holds the answer to another question, or other files.
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
            if overwrite:
                cls.clear_scratch(path)
            if not index[cls.parts]:  # files of an answer that is replaced: deleted only now, when no index lists them
                for file in (*path.glob("*.safetensors"), *(path / name for name in BESIDE if (path / name).exists())):
                    file.unlink()
        return cls(path, index)

    @staticmethod
    def is_at(path: str | Path) -> bool:
        """Return whether a directory holds an attribution, finished or not."""
        return _ANSWERS.is_at(path)

    @staticmethod
    def clear_scratch(path: Path, but: Path | None = None) -> None:
        """Delete the attributions of blocks that were under way, all but one."""
        for left in path.glob("scratch-*"):
            if left != but and left.is_dir() and not left.is_symlink():
                shutil.rmtree(left)

    @property
    def queries(self) -> tuple[int, ...]:
        """Names of all queries, including those without an answer yet."""
        return tuple(self._index["queries"])

    @classmethod
    def _changes(cls, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
        """Return the names of the settings in which two questions differ."""
        before, after = found["about"], wanted["about"]
        names = [key for key in {**before, **after} if key not in cls._free and before.get(key) != after.get(key)]
        names += [key for key in ("queries", "removals") if found[key] != wanted[key]]
        if not cls._goes_on(found["wanted"], wanted["wanted"]):
            names.append("runs")
        return list(dict.fromkeys(names))

    @staticmethod
    def _goes_on(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
        """Return whether an answer over some runs can be extended to others."""
        return before == after

    def _add(
        self,
        part: str,
        name: str,
        table: tuple[str, Tensor],
        others: Mapping[str, Tensor],
        facts: Mapping[str, Any],
    ) -> None:
        """Write a part to its file, then list it."""
        with _ANSWERS.written(self.path):
            entry = StoredTable.write(self.path / f"{name}.safetensors", *table, others)
            self._index[self.parts][part] = entry | dict(facts)
            _ANSWERS.write(self.path, self._index)


class AttributionStore(Store):
    """An answer stored run by run. It can be extended with more runs, if those of the same name are unchanged.

    Each file holds ``baseline`` ``(queries,)``, ``responses`` ``(queries, removals)`` and the checksums of each query's
    responses, ``checksums`` ``(queries,)``.
    """

    parts: ClassVar[str] = "runs"
    _free: ClassVar[tuple[str, ...]] = ("range", "scale", "seeds", "fixed_sources")

    @property
    def about(self) -> dict[str, Any]:
        """Description of the attribution, with the facts of each run, and the chaotic runs."""
        return with_runs(self._index["about"], self._index["runs"])

    @property
    def finished(self) -> tuple[str, ...]:
        """Names of the runs whose responses are on disk."""
        return tuple(sorted(self._index["runs"]))

    @property
    def unfinished(self) -> tuple[str, ...]:
        """Names of the runs to attribute whose responses are not on disk yet."""
        return tuple(name for name in self._index["wanted"] if name not in self._index["runs"])

    def add(self, run: str, baseline: Tensor, responses: Tensor, facts: Mapping[str, Any]) -> None:
        """Write the answer for a run.

        Args:
            run: Name of the run.
            baseline: Measurements m(theta_T) ``(queries,)``.
            responses: Responses ``(queries, removals)``.
            facts: The run's values of :data:`OF_RUNS`.

        Raises:
            AttributionError: If the directory cannot be written to.
        """
        self._add(run, run, ("responses", responses), {"baseline": baseline}, {key: facts[key] for key in OF_RUNS})

    def read(self) -> tuple[Tensor, StoredResponses]:
        """Read the baseline ``(runs, queries)`` and map the responses ``(runs, queries, removals)`` of finished runs.

        Raises:
            TrajectoryError: If no run is finished, or a file is damaged.
        """
        if not self.finished:
            raise TrajectoryError(f"{self.path} has no finished run. Call attribute again with this output.")
        entries = [self._index["runs"][run] for run in self.finished]
        sizes = {"queries": len(self.queries), "removals": self._index["removals"]}
        expected: dict[str, Expected] = {
            "baseline": (FLOATS, ("queries",)),
            "responses": (FLOATS, ("queries", "removals")),
        }
        runs = [StoredTable.map(self.path, entry, "responses", expected, sizes) for entry in entries]
        if len({run.table.dtype for run in runs}) > 1:
            raise TrajectoryError(f"{self.path} holds responses of different data types. Attribute again.")
        return torch.stack([run.others["baseline"] for run in runs]), StoredResponses(runs)

    @staticmethod
    @override
    def _goes_on(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
        return before.items() <= after.items()


def read_index(path: str | Path) -> dict[str, Any]:
    """Return the index of a stored attribution; it has either ``runs`` or ``blocks`` of queries.

    Raises:
        TrajectoryError: If the index does not exist, is damaged, or has an unknown format.
    """
    index = _ANSWERS.read(Path(path))
    if ("runs" in index) == ("blocks" in index):
        raise TrajectoryError(f"{path} is damaged: it lists no runs, or blocks as well. Attribute again.")
    return index


def store_gallery(path: Path, gallery: Gallery) -> None:
    """Write the gallery of a stored attribution.

    Raises:
        AttributionError: If the directory cannot be written to.
    """
    with _ANSWERS.written(path):
        write_gallery(path, gallery)


def with_runs(about: Mapping[str, Any], facts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the description of an attribution, with the facts of each run, and the chaotic runs."""
    of_runs = {key: {run: facts[run][key] for run in sorted(facts)} for key in OF_RUNS}
    return {**about, **of_runs, "chaotic": chaotic(of_runs["response_norm"])}


def warn_unfinished(path: str | Path, what: str, missing: Sequence[str]) -> None:
    """Warn about the missing parts of an unfinished attribution, if there are any."""
    if missing:
        warnings.warn(
            f"{path} is unfinished: {len(missing)} {what} are missing ({', '.join(missing)}). Call attribute "
            "again with the same output to continue.",
            stacklevel=3,
        )
