"""Responses on disk that act as a tensor: an index reads what it selects, and verifies its checksum."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from typing_extensions import override

from lightning_dtda.attribution.scales import predicted
from lightning_dtda.compatibility import is_in_place, plain_results, shaped, tree_map_only
from lightning_dtda.errors import AttributionError, TrajectoryError
from lightning_dtda.trajectory.schema import INT64, Expected, FileEntry, check_tensors
from lightning_dtda.trajectory.storage import DAMAGED_TENSORS, check_size, write_tensors

_READ_ONLY = "Responses on disk cannot be changed. Change a copy: responses.clone()."

AT_ONCE = 2**20
"""Number of samples processed at once: 8 MiB in double precision, and a few times that while they are sorted."""

_FREED = 31 * 2**20
"""Bytes of the largest block, less a few pages, by which glibc's malloc adapts its thresholds (mallopt(3))."""


@dataclass(frozen=True, eq=False)
class StoredTable:
    """A table on disk, with a checksum for each row. The file is memory-mapped, so only pages in use are read.

    Args:
        path: Path of the file.
        others: Smaller tensors of the same file, in memory.
        table: Memory-mapped table ``(rows, ...)``, with one row for each query.
        checksums: Checksum of each row ``(rows,)``.
        compared: Whether the checksum of each row has been verified ``(rows,)``.
    """

    path: Path
    others: dict[str, Tensor]
    table: Tensor
    checksums: Tensor
    compared: Tensor

    @classmethod
    def write(cls, path: Path, name: str, table: Tensor, others: Mapping[str, Tensor]) -> FileEntry:
        """Write a table under a name; return the file's entry for an index, with a checksum of the other tensors."""
        checksums = torch.tensor([_checksum(row) for row in table], dtype=torch.int64)
        entry = write_tensors(path, {**others, "checksums": checksums, name: table})
        entry["crc32"] = _checksum_of_all([*others.values(), checksums])
        return entry

    @classmethod
    def map(
        cls, directory: Path, entry: FileEntry, name: str, expected: Mapping[str, Expected], sizes: Mapping[str, int]
    ) -> StoredTable:
        """Open the table that an index lists, without reading it.

        Args:
            directory: Directory of the file.
            entry: Entry of the index.
            name: Name of the table.
            expected: Types and shapes of the table, which has a row for each of the ``"queries"``, and the others.
            sizes: Sizes that the index says.

        Raises:
            TrajectoryError: If the file is missing or truncated, or tensors other than the table are damaged.
        """
        path = check_size(directory, entry)
        names = [*(other for other in expected if other != name), "checksums"]
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {each: file.get_tensor(each) for each in (*names, name)}
        except (*DAMAGED_TENSORS, OSError) as error:
            raise TrajectoryError(f"{path} cannot be read ({error}). Attribute the run again.") from error
        if _checksum_of_all([tensors[each] for each in names]) != entry["crc32"]:
            raise _damaged(path)
        check_tensors(tensors, {**expected, "checksums": (INT64, ("queries",))}, path, sizes)
        held = {each: tensors[each].clone() for each in names}
        checksums = held.pop("checksums")
        return cls(path, held, tensors[name], checksums, torch.zeros(len(checksums), dtype=torch.bool))

    def __getitem__(self, index: Any) -> Tensor:
        """Read the part at an index.

        Raises:
            TrajectoryError: If a row that is read is damaged.
        """
        rows = torch.atleast_1d(torch.arange(len(self.table))[index[0] if isinstance(index, tuple) else index])
        for row in rows[~self.compared[rows]].tolist():
            if _checksum(self.table[row]) != self.checksums[row]:
                raise _damaged(self.path)
            self.compared[row] = True
        return self.table[index]


class StoredResponses(Tensor):
    """Responses ``(runs, queries, removals)`` on disk, with a file for each run, as a read-only tensor.

    An index reads what it selects; an index that only selects several runs reads nothing. Functions of the tensor read
    all of it. The checksum of each query's responses is verified when they are first read.

    Args:
        runs: Responses of each run ``(queries, removals)``; at least one run.
    """

    runs: tuple[StoredTable, ...]

    @staticmethod
    def __new__(cls, runs: Sequence[StoredTable]) -> StoredResponses:
        """Make a tensor with a shape and a type, but without memory."""
        table = runs[0].table
        shape = (len(runs), *table.shape)
        made = shaped(cls, shape, table)
        made.runs = tuple(runs)
        return made

    @override
    def __getitem__(self, index: Any) -> Tensor:
        """Read a part into memory, or select runs."""
        parts = of_each_dimension(index)
        if parts is None or sum(not isinstance(part, (int, slice)) for part in parts) > 1:
            return self.read()[index]  # paired positions and new dimensions: let torch handle them
        runs, queries, removals = parts
        if isinstance(runs, int):
            return self.runs[runs][queries, removals].clone()
        chosen = [self.runs[run] for run in torch.arange(len(self.runs))[runs].tolist()]
        if not chosen:
            return self.read()[index]
        if isinstance(queries, slice) and isinstance(removals, slice) and queries == removals == slice(None):
            return StoredResponses(chosen)
        return torch.stack([run[queries, removals] for run in chosen])

    def __setitem__(self, index: Any, value: Any) -> None:
        raise AttributionError(_READ_ONLY)

    def read(self) -> Tensor:
        """Read all responses into memory."""
        return torch.stack([run[:] for run in self.runs])

    @classmethod
    @override
    def __torch_function__(cls, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        with plain_results():  # results are tensors, not of this class
            return function(*arguments, **(keywords or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares it without its class
        cls, function: Any, types: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        """Apply a function to the responses in memory."""
        if is_in_place(function):
            raise AttributionError(_READ_ONLY)
        arguments, keywords = tree_map_only(cls, cls.read, (arguments, keywords or {}))
        return function(*arguments, **keywords)

    # methods that bypass torch's dispatcher

    def __repr__(self) -> str:  # type: ignore[override]
        return f"StoredResponses({tuple(self.shape)}, {self.dtype}, in {self.runs[0].path.parent})"

    @override
    def numpy(self, *, force: bool = False) -> Any:
        """Read all responses into an array."""
        return self.read().numpy(force=force)

    @override
    def tolist(self) -> Any:
        """Read all responses into lists."""
        return self.read().tolist()

    @override
    def untyped_storage(self) -> torch.UntypedStorage:
        """Return the storage of a copy in memory."""
        return self.read().untyped_storage()

    @override
    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.read().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> StoredResponses:
        return self


def of_each_dimension(index: Any) -> tuple[Any, Any, Any] | None:
    """Split an index into its parts for runs, queries and removals; ``None`` if it has anything unusual."""
    parts = list(index) if isinstance(index, tuple) else [index]
    gap = next((number for number, part in enumerate(parts) if part is Ellipsis), len(parts))
    given = [part for part in parts if part is not Ellipsis]
    parts[gap : gap + 1] = [slice(None)] * (3 - len(given))
    parts = [part if isinstance(part, slice) else _positions(part) for part in parts]
    return (parts[0], parts[1], parts[2]) if len(parts) == 3 and all(part is not None for part in parts) else None


def _positions(part: Any) -> int | Tensor | None:
    """Return an integer, or a vector of positions or booleans; ``None`` for anything else."""
    if part is None:
        return None
    found = torch.as_tensor(part).cpu()
    if found.ndim == 0:
        return int(found) if found.dtype in (torch.int64, torch.int32) else None
    if found.ndim > 1 or (len(found) and found.is_floating_point()):
        return None
    return found if found.dtype == torch.bool else found.long()


def _checksum(tensor: Tensor, start: int = 0) -> int:
    """Return the CRC-32 of a tensor's type, shape and content."""
    kind = f"{tensor.dtype} {tuple(tensor.shape)}".encode()
    dense = tensor.detach().cpu().contiguous()
    # a tensor with a single element may have any stride
    content: Any = dense.as_strided((dense.numel(),), (1,)).view(torch.uint8).numpy()
    return zlib.crc32(content, zlib.crc32(kind, start))


def _checksum_of_all(tensors: Sequence[Tensor]) -> int:
    return reduce(lambda before, tensor: _checksum(tensor, before), tensors, 0)


def _damaged(path: Path) -> TrajectoryError:
    return TrajectoryError(f"{path} is damaged (its checksum differs). Attribute the run again.")


def in_parts(
    function: Any,
    baseline: Tensor,
    responses: Tensor,
    queries: slice | list[int],
    into: Tensor,
    scale: str,
    copies: int = 1,
) -> None:
    """Apply a function to samples ``(runs, queries, 1)`` and their predictions, and write the result.

    Args:
        function: Function of samples and predictions ``(runs, queries, removals)`` that returns ``(..., removals)``.
        baseline: Samples of all queries.
        responses: Responses ``(runs, queries, removals)``.
        queries: Queries to use.
        into: Tensor for the result.
        scale: Scale of the predictions.
        copies: Memory that the function needs, as a multiple of its argument.
    """
    if into.device.type == "cpu":
        # glibc hands freed memory back until a block as large as this was freed; to get it again took half of the time
        torch.empty(_FREED, dtype=torch.uint8)
    # in double precision: a change of the variance is a small difference of large squares; in parts, to save memory
    samples = baseline[:, queries, None].double()
    size = max(1, AT_ONCE // (samples.numel() * copies))
    # written in place: small results between large intermediate ones would fragment the heap
    for start in range(0, responses.shape[2], size):
        part = responses[:, queries, start : start + size].double()
        into[..., start : start + size] = function(samples, predicted(scale, samples, part))
