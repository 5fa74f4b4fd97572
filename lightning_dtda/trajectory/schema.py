"""What JSON and tensor files may hold: types of entries, shapes of tensors, and one way to refuse anything else."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
import torch
from torch import Tensor
from typing_extensions import TypedDict

from lightning_dtda.errors import DTDAError, TrajectoryError

Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
"""A number that torch's indices can hold."""

_ELSEWHERE = r"/\\:" if os.name == "nt" else "/"
FileName = Annotated[str, msgspec.Meta(pattern=rf"\A(?!\.\.?\Z)[^\0\ud800-\udfff{_ELSEWHERE}]+\Z", max_length=255)]
"""A plain file name: no part of it leads elsewhere."""

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
INT64 = (torch.int64,)

Expected = tuple[tuple[torch.dtype, ...], tuple[int | str, ...]]
"""Data types and shape of a tensor; names stand for sizes that several tensors share."""


class FileEntry(TypedDict):
    """A tensor file as an index lists it."""

    file: FileName
    bytes: Count
    crc32: Count


def conform(content: Any, schema: Any, where: object, error: type[DTDAError] = TrajectoryError) -> None:
    """Check that JSON data have the types of a schema. Entries that the schema does not have are passed over.

    Args:
        content: The data.
        schema: A type that msgspec can check.
        where: What holds the data, for the message.
        error: Type of error to raise.

    Raises:
        DTDAError: If they have others; the message names the entry.
    """
    try:
        msgspec.convert(list(content) if isinstance(content, (tuple, range)) else content, schema)
    except (msgspec.ValidationError, UnicodeError, RecursionError) as reason:
        remedy = "It was damaged or forged: record or compute it again." if error is TrajectoryError else "Correct it."
        raise error(f"{where} is not valid: {reason}. {remedy}") from None


def check_tensors(
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, Expected],
    where: object,
    sizes: Mapping[str, int] | None = None,
    error: type[DTDAError] = TrajectoryError,
) -> dict[str, int]:
    """Check data types and shapes of tensors.

    Args:
        tensors: Tensors by name.
        expected: What must be there.
        where: What holds the tensors, for the message.
        sizes: Sizes that are known by name; others are those of the first tensor that has them.
        error: Type of error to raise.

    Returns:
        All sizes by name.

    Raises:
        DTDAError: If a tensor is missing, or has another type or shape; the message names it.

    Example:
        >>> check_tensors({"x": torch.ones(2, 3)}, {"x": (FLOATS, ("rows", 3))}, "The file")
        {'rows': 2}
    """
    known = dict(sizes or {})
    for name, (dtypes, shape) in expected.items():
        if name not in tensors:
            raise error(f"{where} is missing {name!r}.")
        if not isinstance(found := tensors[name], Tensor):
            raise error(f"{where}: {name} is of type {type(found).__name__}, but must be a tensor.")
        if len(found.shape) == len(shape):
            for size, length in zip(shape, found.shape, strict=True):
                if isinstance(size, str):
                    known.setdefault(size, length)
        wanted = tuple(size if isinstance(size, int) else known.get(size, size) for size in shape)
        if tuple(found.shape) != wanted:
            raise error(f"{where}: {name} has shape {tuple(found.shape)}, but must be {_described(shape, wanted)}.")
        if found.dtype not in dtypes:
            raise error(f"{where}: {name} has data type {found.dtype}, but must be {' or '.join(map(str, dtypes))}.")
    return known


def _described(shape: tuple[int | str, ...], wanted: tuple[int | str, ...]) -> str:
    names = ", ".join(map(str, shape))
    return f"({names}) = {wanted}" if any(isinstance(size, str) for size in shape) else str(wanted)
