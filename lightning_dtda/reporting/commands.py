"""The command that made an attribution, kept beside it so that reports can give others like it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from typing_extensions import TypedDict

from lightning_dtda.attribution.attribution import Attribution
from lightning_dtda.trajectory.schema import conform
from lightning_dtda.trajectory.storage import read_json, write_json

_KEPT = "command.json"
_NUMBER = re.compile(r"-\.?\d")


class _Kept(TypedDict):
    """Content of :data:`_KEPT`."""

    arguments: list[str]
    ensemble: str


@dataclass(frozen=True)
class Command:
    """The command that made an attribution.

    Args:
        arguments: Arguments of ``lightning-dtda attribute``.
        ensemble: Directory of the recorded runs.
    """

    arguments: tuple[str, ...]
    ensemble: str

    def given(self, options: Sequence[str]) -> list[str]:
        """Return the arguments of some options, and of those below them, such as ``--model.width``."""
        chosen: list[str] = []
        taking = False
        for argument in self.arguments:
            if argument.startswith("-") and not _NUMBER.match(argument):
                taking = re.split("[.=+]", argument, maxsplit=1)[0] in options
            if taking:
                chosen.append(argument)
        return chosen


def keep_command(path: Path, command: Command) -> None:
    """Store the command in the attribution's directory."""
    write_json(path / _KEPT, {"arguments": list(command.arguments), "ensemble": command.ensemble})


def kept_command(attribution: Attribution) -> Command | None:
    """Return the command that made an attribution; ``None`` if Python made it.

    Raises:
        TrajectoryError: If the file is damaged.
    """
    path = None if attribution.path is None else attribution.path / _KEPT
    if path is None or not path.exists():
        return None
    content = read_json(path)
    conform(content, _Kept, path)
    return Command(tuple(content["arguments"]), content["ensemble"])
