"""Files that are either complete or absent: safetensors and JSON, renamed into place and checked when read."""

from __future__ import annotations

import errno
import io
import json
import mmap
import os
import stat
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
from lightning_dtda.trajectory.schema import FileEntry

if sys.platform == "linux":
    import fcntl

try:  # the same checksum, about five times faster thanks to dedicated processor instructions
    from isal.isal_zlib import crc32
except ImportError:
    from zlib import crc32

_CHECKSUM = "crc32"
"""Name of the JSON entry that holds the checksum of the other entries."""

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
"""Names of the data types in safetensors."""

_LARGEST_JSON = 2**30
"""Largest size of a JSON file in bytes; the manifest of a run with a million checkpoints has a tenth of it."""

_DEEPEST_JSON = 100
"""Largest number of levels in JSON. Python limits those that functions of it can follow to about a thousand."""

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

DAMAGED_TENSORS = (SafetensorError, ValueError, KeyError, TypeError, RuntimeError)
"""What safetensors may raise for a damaged header; ``KeyError`` for a data type that torch does not have."""

_PIECE = 2**22
"""Number of bytes that are checksummed and written at a time."""

_DIRECT_BYTES = 2**20
"""Minimum size in bytes of a tensor that bypasses the page cache. Smaller ones are written quickly, and are best read
from the cache."""

PAGE = mmap.PAGESIZE
"""Page size in bytes. Only whole pages, aligned in memory and in the file, can bypass the page cache."""


@contextmanager
def _replacing(path: Path) -> Iterator[io.BufferedWriter]:
    """Open a file under a temporary name and rename it into place, so no reader ever sees a partial file."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)  # left by a killed process, or a link or a pipe, which must not be written to
    try:
        with partial.open("xb") as file:
            yield file
        partial.replace(path)
    except BaseException:  # also if the program is interrupted
        partial.unlink(missing_ok=True)
        raise


def is_disk_full(error: BaseException | None) -> bool:
    """Return whether a full disk, or an exhausted quota, is what caused an error."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or error.__context__
    return False


def replace_file(path: Path, content: bytes) -> None:
    """Write a file atomically."""
    with _replacing(path) as file:
        file.write(content)


def _write_directly(file: io.BufferedWriter, piece: memoryview) -> None:
    """Write to disk, bypassing the page cache where possible: for whole pages."""
    whole, rest = piece[: len(piece) // PAGE * PAGE], piece[len(piece) // PAGE * PAGE :]
    if sys.platform == "linux":
        file.flush()
        flags = fcntl.fcntl(file, fcntl.F_GETFL)
        try:
            fcntl.fcntl(file, fcntl.F_SETFL, flags | os.O_DIRECT)
            while whole:
                whole = whole[file.raw.write(whole) :]
        except OSError as error:
            # a file system that does not support direct writes, or larger sectors
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        finally:
            fcntl.fcntl(file, fcntl.F_SETFL, flags)
    file.write(whole)
    file.write(rest)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object atomically, one entry per line, with its checksum last."""
    # not with json's indent, which switches from the C encoder to the Python one, ten times slower
    entries = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in content.items()]
    checksum = crc32(f"{{{', '.join(entries)}}}".encode())  # of the output of json.dumps for the whole object
    lines = ",\n ".join([*entries, f'"{_CHECKSUM}": {checksum}'])
    replace_file(path, f"{{\n {lines}\n}}\n".encode())


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        TrajectoryError: If the file is missing, is not a JSON object, or was changed after it was written.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # reading a pipe or a device may never end
            raise TrajectoryError(f"{path} is not a regular file. Record or compute it again.")
        if status.st_size > _LARGEST_JSON:
            raise TrajectoryError(f"{path} is damaged: it is too large. Record or compute it again.")
        content = json.loads(path.read_bytes())
        json.dumps(content, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    except FileNotFoundError:
        raise TrajectoryError(f"{path} does not exist.") from None
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        raise TrajectoryError(f"{path} cannot be read ({error}). Record or compute it again.") from error
    if not isinstance(content, dict):
        raise TrajectoryError(f"{path} is not a JSON object. Record or compute it again.")
    if _is_deep(content):
        raise TrajectoryError(f"{path} is damaged: it has too many levels. Record or compute it again.")
    if content.pop(_CHECKSUM, None) != _checksum(content):
        raise TrajectoryError(f"{path} was altered or damaged (checksum mismatch). Record or compute it again.")
    return content


def _is_deep(content: Any) -> bool:
    level = [content]
    for _ in range(_DEEPEST_JSON):
        containers = [value for value in level if isinstance(value, (dict, list))]
        if not containers:
            return False
        level = [below for one in containers for below in (one.values() if isinstance(one, dict) else one)]
    return True


def _checksum(content: Mapping[str, Any]) -> int:
    return crc32(json.dumps(content).encode())


def write_tensors(path: Path, tensors: Mapping[str, Tensor], direct: bool = False) -> FileEntry:
    """Write tensors as safetensors and return the file's entry for a manifest: name, bytes and checksum.

    The tensors are written without a copy, unless they are on another device.

    Args:
        path: File to write.
        tensors: Tensors by name.
        direct: Whether to bypass the page cache for the largest tensor if it is large. This saves another copy, but
            waits for the disk. If the operating system or the file system does not support it, the cache is used.

    Raises:
        TypeError: If safetensors has no name for a tensor's data type.
    """
    # widest data type first, as in safetensors, to align every tensor; the largest may then start at any page
    ordered = dict(sorted(tensors.items(), key=lambda item: (-item[1].itemsize, -item[1].nbytes, item[0])))
    described: dict[str, Any] = {}
    end = 0
    for name, tensor in ordered.items():
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"safetensors files cannot hold tensors of {tensor.dtype}, such as {name!r}")
        start, end = end, end + tensor.nbytes
        described[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    header = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    past = _largest(ordered) if direct else None
    shift = ordered[past].data_ptr() - described[past]["data_offsets"][0] if past is not None else 0
    if shift % 8:
        past, shift = None, 0
    # pad with spaces, which the format allows, so that pages of the directly written tensor are pages of the file
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
    """Return the name of the largest tensor, if it can bypass the page cache."""
    name = max(tensors, key=lambda name: tensors[name].nbytes, default=None)
    if name is None or tensors[name].nbytes < _DIRECT_BYTES:
        return None
    return name if tensors[name].device.type == "cpu" and tensors[name].is_contiguous() else None


def _pieces(tensor: Tensor) -> Iterator[memoryview]:
    """Yield the bytes of a tensor, little endian, in pieces; all but the first start at a memory page."""
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().reshape(-1)
    flat = torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat.contiguous()
    # as integers of the same width, since NumPy lacks some data types; byte swaps are needed on few machines
    integers = flat.view(_INTEGERS[flat.itemsize]).numpy().astype(f"<i{flat.itemsize}", copy=False)
    content = integers.view(np.uint8).data
    first = min(len(content), -flat.data_ptr() % PAGE)
    yield content[:first]
    for start in range(first, len(content), _PIECE):
        yield content[start : start + _PIECE]


def check_size(directory: Path, entry: FileEntry) -> Path:
    """Compare a file's size with its manifest entry: a cheap check for truncated and missing files.

    Returns:
        Path of the file.

    Raises:
        TrajectoryError: If the size differs or there is no such regular file; the message names the file.
    """
    path = directory / entry["file"]
    try:
        size = path.stat().st_size if path.is_file() else None
    except OSError as error:
        raise TrajectoryError(f"{path} cannot be read ({error}). Make it readable, or record it again.") from error
    if size != entry["bytes"]:
        found = "is missing" if size is None else f"has {size} bytes"
        raise TrajectoryError(
            f"{path} {found}; the manifest lists {entry['bytes']} bytes. The run is damaged: record it again."
        )
    return path


def read_tensors(directory: Path, entry: FileEntry) -> dict[str, Tensor]:
    """Read a safetensors file listed in a manifest, and verify its checksum.

    Raises:
        TrajectoryError: If the file is missing, truncated or altered; the message names it.
    """
    path = check_size(directory, entry)
    try:
        content = path.read_bytes()
    except (OSError, MemoryError) as error:
        raise TrajectoryError(f"{path} cannot be read ({error or 'too large for the memory'}).") from error
    if crc32(content) != entry["crc32"]:
        raise TrajectoryError(f"{path} was altered or damaged (checksum mismatch). Record the run again.")
    try:
        # no pickle: a header of names, shapes and offsets, limited to the bytes whose checksum was just verified
        return safetensors.torch.load(content)
    except DAMAGED_TENSORS as error:
        raise TrajectoryError(f"{path} is not a safetensors file ({error}). Record the run again.") from error
