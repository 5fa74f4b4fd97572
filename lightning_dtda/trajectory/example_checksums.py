"""Checksums of the training examples, used to find and name examples that changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_dtda.errors import TrajectoryError
from lightning_dtda.trajectory.schema import INT64, check_tensors

_LISTED = 10
"""Number of examples that a message names."""


@dataclass(frozen=True)
class ExampleChecksums:
    """Checksums of all examples of a data set, or of every second, fourth, eighth, ... example.

    Strides are powers of two, so for any two strides, one set of examples contains the other.

    Args:
        length: N, the number of examples.
        stride: Distance between examples with a checksum; 1 means all examples.
        values: Checksums in order ``(ceil(N / stride),)``, int64.

    Example:
        >>> recorded = ExampleChecksums(4, 1, torch.tensor([5, 6, 7, 8]))
        >>> recorded.changed(ExampleChecksums(4, 2, torch.tensor([5, 9])))
        [2]
    """

    length: int
    stride: int
    values: Tensor

    def __len__(self) -> int:
        return len(self.values)

    def changed(self, other: ExampleChecksums) -> list[int]:
        """Return the examples that have a checksum in both sets but a different one.

        Args:
            other: Checksums of a data set of the same length.
        """
        stride = max(self.stride, other.stride)
        mine, others = (checksums.values[:: stride // checksums.stride] for checksums in (self, other))
        return [stride * int(number) for number in (mine != others).nonzero()]

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors to write to a file."""
        return {"checksums": self.values, "stride": torch.tensor(self.stride)}

    @classmethod
    def of(cls, length: int, tensors: Mapping[str, Tensor]) -> ExampleChecksums:
        """Create the checksums from the tensors of a file.

        Raises:
            TrajectoryError: If the file holds something else.
        """
        check_tensors(tensors, {"checksums": (INT64, ("checksums",)), "stride": (INT64, ())}, "The file of examples")
        values, stride = tensors["checksums"], int(tensors["stride"])
        if stride < 1 or stride & (stride - 1) or len(values) != -(-length // stride):
            raise TrajectoryError(
                f"{len(values)} checksums with stride {stride} cannot belong to {length} training examples."
            )
        return cls(length, stride, values)


def list_examples(indices: Sequence[int]) -> str:
    """Format example indices for a sentence, naming only the first few.

    Example:
        >>> list_examples([17, 40, 311])
        '17 (and 2 others: 40, 311)'
        >>> list_examples([17])
        '17'
    """
    first, *others = indices
    if not others:
        return str(first)
    named = ", ".join(map(str, others[: _LISTED - 1])) + (", ..." if len(indices) > _LISTED else "")
    return f"{first} (and {len(others)} other{'s' if len(others) > 1 else ''}: {named})"
