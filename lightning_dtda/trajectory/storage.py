"""Files that are either whole or not there: safetensors and JSON, renamed into place, checked when read."""

from __future__ import annotations

import errno
import io
import json
import mmap
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from lightning_dtda.errors import TrajectoryError

if sys.platform == "linux":
    import fcntl

try:  # the same checksum, by instructions that processors have for it: some five times as fast
    from isal.isal_zlib import crc32
except ImportError:
    from zlib import crc32

_CHECKSUM = "crc32"
"""Entry of a JSON file that holds the checksum of the others."""

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
}
"""What safetensors calls the data types."""

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_PIECE = 2**22
"""Bytes that are checksummed and written at a time."""

_DIRECT_BYTES = 2**22
"""A tensor that may go past the system's cache is at least so large: less is soon written, and best read from there."""

PAGE = mmap.PAGESIZE
"""What goes past the system's cache are whole pages, in memory and in the file."""


@contextmanager
def _replacing(path: Path) -> Iterator[io.BufferedWriter]:
    """Open a file under another name and rename it into place, so that no reader ever sees half of it."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        yield file
    partial.replace(path)


def replace_file(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all."""
    with _replacing(path) as file:
        file.write(content)


def _write_directly(file: io.BufferedWriter, piece: memoryview) -> None:
    """Write to the disk past the system's cache; through it what cannot be written otherwise."""
    if sys.platform == "linux":
        file.flush()
        flags = fcntl.fcntl(file, fcntl.F_GETFL)
        try:
            fcntl.fcntl(file, fcntl.F_SETFL, flags | os.O_DIRECT)
            while piece:
                piece = piece[file.raw.write(piece) :]
        except OSError as error:
            # not whole pages; or a file system that has no way past the cache
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        finally:
            fcntl.fcntl(file, fcntl.F_SETFL, flags)
    file.write(piece)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object, whole or not at all, a line for each of its entries, its checksum last."""
    # not json's own indent, which leaves its encoder in C for one in Python, ten times slower
    entries = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in content.items()]
    checksum = crc32(f"{{{', '.join(entries)}}}".encode())  # of what json.dumps makes of the whole
    lines = ",\n ".join([*entries, f'"{_CHECKSUM}": {checksum}'])
    replace_file(path, f"{{\n {lines}\n}}\n".encode())


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
    return crc32(json.dumps(content).encode())


def write_tensors(path: Path, tensors: Mapping[str, Tensor], direct: bool = False) -> dict[str, Any]:
    """Write tensors as safetensors and return the file's entry for a manifest: name, bytes and checksum.

    The bytes go to the system from where they are: no copy of the tensors is made, unless they are on another device.

    Args:
        path: The file.
        tensors: What it is to hold.
        direct: Whether the largest tensor, where it is large, goes to the disk past the system's cache: without another
            copy, and waiting for the disk. Where the system or the file system has no such way, it goes through the
            cache.

    Raises:
        TypeError: If safetensors has no name for a tensor's data type.
    """
    # the widest first, as safetensors has it, so that every tensor is aligned; the largest may then begin at any page
    ordered = dict(sorted(tensors.items(), key=lambda item: (-item[1].itemsize, -item[1].nbytes, item[0])))
    described: dict[str, Any] = {}
    end = 0
    for name, tensor in ordered.items():
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"safetensors files hold no tensors of {tensor.dtype}, such as {name!r}")
        start, end = end, end + tensor.nbytes
        described[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    header = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    past = _largest(ordered) if direct else None
    shift = ordered[past].data_ptr() - described[past]["data_offsets"][0] if past is not None else 0
    if shift % 8:
        past, shift = None, 0
    # spaces, which the format allows: up to where the pages of what goes past the cache are pages of the file
    header += b" " * ((shift - 8 - len(header)) % (8 if past is None else PAGE))
    begin = len(header).to_bytes(8, "little") + header
    checksum = crc32(begin)
    with _replacing(path) as file:
        file.write(begin)
        for name, tensor in ordered.items():
            for piece in _pieces(tensor):
                checksum = crc32(piece, checksum)
                if name == past:
                    _write_directly(file, piece)
                else:
                    file.write(piece)
    return {"file": path.name, "bytes": len(begin) + end, "crc32": checksum}


def _largest(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the name of the largest tensor, if it may go past the system's cache."""
    name = max(tensors, key=lambda name: tensors[name].nbytes, default=None)
    if name is None or tensors[name].nbytes < _DIRECT_BYTES:
        return None
    return name if tensors[name].device.type == "cpu" and tensors[name].is_contiguous() else None


def _pieces(tensor: Tensor) -> Iterator[memoryview]:
    """Yield the bytes of a tensor, little endian; after the first piece, pieces begin at a page of the memory."""
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().reshape(-1)
    flat = torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat.contiguous()
    # as integers of the same width, since NumPy lacks some data types; few machines have any to swap
    integers = flat.view(_INTEGERS[flat.itemsize]).numpy().astype(f"<i{flat.itemsize}", copy=False)
    content = integers.view(np.uint8).data
    first = min(len(content), -flat.data_ptr() % PAGE)
    yield content[:first]
    for start in range(first, len(content), _PIECE):
        yield content[start : start + _PIECE]


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
    if crc32(content) != entry["crc32"]:
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
