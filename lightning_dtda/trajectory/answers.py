"""A directory that holds the answer to one question, with an index of what was asked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_dtda.errors import DTDAError, TrajectoryError
from lightning_dtda.trajectory.schema import conform
from lightning_dtda.trajectory.storage import is_disk_full, read_json, write_json


@dataclass(frozen=True)
class Answers:
    """A kind of answer, such as an attribution, and its index: the JSON file that says what was asked.

    Args:
        index: Name of the index file.
        noun: What the directory holds, e.g. "attribution".
        verb: Function and command that make one, e.g. "attribute".
        version: Version of the format.
        schema: Types of what the index holds.
        error: Exception to raise if an answer cannot be started.
        ignored: Files that may exist before the index does.
    """

    index: str
    noun: str
    verb: str
    version: int
    schema: Any
    error: type[DTDAError]
    ignored: tuple[str, ...] = ()

    def is_at(self, path: str | Path) -> bool:
        """Return whether a directory holds an answer, finished or not."""
        return (Path(path) / self.index).exists()

    def read(self, path: Path) -> dict[str, Any]:
        """Read the index of a stored answer.

        Raises:
            TrajectoryError: If there is none, it is damaged, or its format is unknown.
        """
        if not self.is_at(path):
            verb = self.verb
            raise TrajectoryError(
                f"{path} holds no {self.noun}. Pass the output of lightning_dtda.{verb} or lightning-dtda {verb}."
            )
        index = read_json(path / self.index)
        if index.get("format_version") != self.version:
            raise TrajectoryError(
                f"{path / self.index} has format version {index.get('format_version')!r}; this lightning-dtda reads "
                f"version {self.version}. {self.verb.capitalize()} again."
            )
        conform(index, self.schema, path / self.index)
        return index

    def found(self, path: Path, overwrite: bool) -> dict[str, Any]:
        """Return the index of the answer in a directory; empty if a new answer may start.

        Raises:
            DTDAError: If it is damaged, or has another format.
        """
        if overwrite or not self.is_at(path):
            return {}
        index = read_json(path / self.index)
        self.check_same(path, [] if index.get("format_version") == self.version else ["format_version"])
        conform(index, self.schema, path / self.index)
        return index

    def write(self, path: Path, index: dict[str, Any]) -> None:
        """Write the index."""
        write_json(path / self.index, index)

    @contextmanager
    def opened(self, path: Path) -> Iterator[None]:
        """Create the directory, and write to it inside the context.

        Raises:
            DTDAError: If the directory holds something else or cannot be written to.
        """
        if path.is_dir() and not self.is_at(path) and any(file.name not in self.ignored for file in path.iterdir()):
            raise self.error(f"{path} is not empty and holds no {self.noun}. Choose another output.")
        with self.written(path):
            path.mkdir(parents=True, exist_ok=True)
            yield

    @contextmanager
    def written(self, path: Path) -> Iterator[None]:
        """Turn errors of writing to the directory into readable ones.

        Raises:
            DTDAError: If the directory cannot be written to.
        """
        try:
            yield
        except OSError as error:
            remedy = "Free some, then call again to continue" if is_disk_full(error) else "Choose another output"
            raise self.error(f"{path} cannot be written to ({error}). {remedy}.") from error

    def check_same(self, path: Path, changes: Sequence[str]) -> None:
        """Refuse the answer to another question.

        Args:
            path: The directory.
            changes: Names of what differs.

        Raises:
            DTDAError: If anything differs.
        """
        if changes:
            raise self.error(
                f"{path} holds the answer to another question (different {', '.join(changes)}). Choose another "
                "output, or overwrite it (overwrite=True, --overwrite)."
            )
