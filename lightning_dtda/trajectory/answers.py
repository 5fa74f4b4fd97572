"""A directory that holds the answer to one question, and says to which."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_dtda.errors import DTDAError, TrajectoryError
from lightning_dtda.trajectory.storage import read_json, write_json


@dataclass(frozen=True)
class Answers:
    """What a kind of answer is called, and the JSON file, its index, that says what was asked.

    Args:
        index: The file's name.
        noun: What the directory holds: an attribution, say.
        verb: What makes one: attribute.
        version: Of the format.
        error: Raised where one cannot be started.
        ignored: Files that may be there before the index is.
    """

    index: str
    noun: str
    verb: str
    version: int
    error: type[DTDAError]
    ignored: tuple[str, ...] = ()

    def is_at(self, path: str | Path) -> bool:
        """Say whether a directory holds an answer, finished or not."""
        return (Path(path) / self.index).exists()

    def read(self, path: Path) -> dict[str, Any]:
        """Read the index of a stored answer.

        Raises:
            TrajectoryError: If there is none, or it is of an unknown format.
        """
        if not self.is_at(path):
            verb = self.verb
            raise TrajectoryError(
                f"{path} holds no {self.noun}. Give the output of lightning_dtda.{verb} or lightning-dtda {verb}."
            )
        index = read_json(path / self.index)
        if index.get("format_version") != self.version:
            raise TrajectoryError(
                f"{path / self.index} has format version {index.get('format_version')!r}; this lightning-dtda reads "
                f"version {self.version}. {self.verb.capitalize()} again."
            )
        return index

    def found(self, path: Path, overwrite: bool) -> dict[str, Any]:
        """Return the index of the answer in a directory, of whatever format; empty if a new one may start."""
        return read_json(path / self.index) if self.is_at(path) and not overwrite else {}

    def write(self, path: Path, index: dict[str, Any]) -> None:
        """Write the index."""
        write_json(path / self.index, index)

    @contextmanager
    def opened(self, path: Path) -> Iterator[None]:
        """Make the directory, and tell what cannot be written to it inside.

        Raises:
            DTDAError: If the directory holds something else, or cannot be written.
        """
        if path.is_dir() and not self.is_at(path) and any(file.name not in self.ignored for file in path.iterdir()):
            raise self.error(f"{path} is not empty and holds no {self.noun}. Choose another output.")
        try:
            path.mkdir(parents=True, exist_ok=True)
            yield
        except OSError as error:
            raise self.error(f"{path} cannot be written ({error}). Choose another output.") from error

    def check_same(self, path: Path, changes: Sequence[str]) -> None:
        """Refuse the answer to another question.

        Args:
            path: The directory.
            changes: What is different.

        Raises:
            DTDAError: If anything is.
        """
        if changes:
            raise self.error(
                f"{path} holds the answer to another question (different {', '.join(changes)}). Choose another output, "
                "or set overwrite (overwrite=True, --overwrite)."
            )
