"""The command that made an attribution, kept beside it so that reports can give it again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from typing_extensions import TypedDict

from lightning_dtda.attribution.attribution import Attribution
from lightning_dtda.trajectory.schema import conform
from lightning_dtda.trajectory.storage import read_json, write_json

_KEPT = "command.json"


class _Kept(TypedDict):
    """Content of :data:`_KEPT`."""

    arguments: list[str]


def keep_command(path: Path, arguments: Sequence[str]) -> None:
    """Store the arguments of ``lightning-dtda attribute`` in the attribution's directory."""
    write_json(path / _KEPT, {"arguments": list(arguments)})


def kept_command(attribution: Attribution) -> list[str] | None:
    """Return the arguments of ``lightning-dtda attribute`` that made an attribution; ``None`` if Python made it.

    Raises:
        TrajectoryError: If the file is damaged.
    """
    path = None if attribution.path is None else attribution.path / _KEPT
    if path is None or not path.exists():
        return None
    content = read_json(path)
    conform(content, _Kept, path)
    arguments: list[str] = content["arguments"]
    return arguments
