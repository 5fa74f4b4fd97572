"""Files that are either whole or not there: safetensors and JSON, renamed into place, checked when read."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from lightning_dtda.errors import TrajectoryError

_CHECKSUM = "crc32"
"""Entry of a JSON file that holds the checksum of the others."""


def replace_file(path: Path, content: bytes) -> None:
    """Write a file under another name and rename it into place, so that no reader ever sees half of it."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content)
    partial.replace(path)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object, whole or not at all, a line for each of its entries, its checksum last."""
    # not json's own indent, which leaves its encoder in C for one in Python, ten times slower
    entries = {**content, _CHECKSUM: _checksum(content)}
    lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(value)}" for name, value in entries.items())
    replace_file(path, f"{{\n{lines}\n}}\n".encode())


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        TrajectoryError: If the file is missing, is not a JSON object, or is not what was written.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise TrajectoryError(f"{path} does not exist.") from None
    except (OSError, ValueError) as error:
        raise TrajectoryError(f"{path} cannot be read ({error}). Record or compute it again.") from error
    if not isinstance(content, dict):
        raise TrajectoryError(f"{path} holds no JSON object. Record or compute it again.")
    if content.pop(_CHECKSUM, None) != _checksum(content):
        raise TrajectoryError(f"{path} is not what was written (its checksum differs). Record or compute it again.")
    return content


def _checksum(content: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(content).encode())


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write tensors as safetensors and return the file's entry for a manifest: name, bytes and checksum."""
    content = safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    replace_file(path, content)
    return {"file": path.name, "bytes": len(content), "crc32": zlib.crc32(content)}


def check_size(directory: Path, entry: Mapping[str, Any]) -> None:
    """Compare a file's length with its manifest entry: cheap, and finds what was truncated or lost.

    Raises:
        TrajectoryError: Naming the file.
    """
    path = entry_path(directory, entry)
    size = path.stat().st_size if path.is_file() else None
    if size != entry["bytes"]:
        found = "is missing" if size is None else f"has {size} bytes"
        raise TrajectoryError(
            f"{path} {found}; the manifest says {entry['bytes']}. The run is damaged: record it again."
        )


def read_tensors(directory: Path, entry: Mapping[str, Any]) -> dict[str, Tensor]:
    """Read a safetensors file that a manifest lists, and compare it with its checksum.

    Raises:
        TrajectoryError: If the file is missing, truncated or altered, naming it.
    """
    check_size(directory, entry)
    path = entry_path(directory, entry)
    content = path.read_bytes()
    if zlib.crc32(content) != entry["crc32"]:
        raise TrajectoryError(f"{path} is not what was written (its checksum differs). Record the run again.")
    try:
        # no pickle: a header of names, shapes and offsets, bounded by the bytes whose checksum was just compared
        return safetensors.torch.load(content)
    except SafetensorError as error:
        raise TrajectoryError(f"{path} is not a safetensors file ({error}). Record the run again.") from error


def entry_path(directory: Path, entry: Mapping[str, Any]) -> Path:
    """Return the path of a manifest's entry, which must be a plain name inside the manifest's directory.

    Raises:
        TrajectoryError: If the name leads anywhere else.
    """
    name = entry["file"]
    if not isinstance(name, str) or Path(name).name != name:
        raise TrajectoryError(f"The manifest in {directory} names the file {name!r}, which is no plain file name.")
    return directory / name
