"""One step of several runs: its micro-batches, recreated, and its starting point."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lightning_dtda.optimizers import State
from lightning_dtda.replay.stand_ins import Time

ByName: TypeAlias = Mapping[str, Tensor]
"""Tensors by name: buffers and frozen parameters, or values that belong to BatchNorm's running statistics."""


@dataclass(frozen=True)
class MicroBatchInputs:
    """The inputs of a pass of one run.

    Args:
        examples: Number of examples B.
        time: Time of the training.
        states: States of the random number generators before the pass; empty if it drew nothing.
        make: Function that returns the collated batch of some rows, given their positions.
        factor: Factor of its loss in the loss of the step.
        keeps_statistics: Whether this pass updates the running statistics. Only passes in the first process of a
            training do: the other processes receive its buffers.
    """

    examples: int
    time: Time
    states: ByName
    make: Callable[[Sequence[int]], Any]
    factor: float = 1.0
    keeps_statistics: bool = True

    def batch(self) -> Any:
        """Return the batch as in the training."""
        return self.make(range(self.examples))

    def of(self, rows: Sequence[int]) -> MicroBatchInputs:
        """Return the inputs of a pass with only the rows at these positions."""
        return replace(self, examples=len(rows), make=lambda some: self.make([rows[row] for row in some]))

    def less_or_more(self) -> Iterator[MicroBatchInputs]:
        """Yield the batch with one example left out (if it has more than two), then with one repeated, for each one."""
        rows = list(range(self.examples))
        if self.examples > 2:
            # start with examples spread over the batch: a few are usually enough
            spread = [0, self.examples // 2, self.examples - 1]
            for row in dict.fromkeys([*spread, *rows]):
                yield self.of(rows[:row] + rows[row + 1 :])
        for row in rows:
            yield self.of([*rows, row])

    def replaced(self) -> Iterator[tuple[int, MicroBatchInputs]]:
        """Yield the position of an example and the batch with that example replaced by another, for up to four."""
        for position in range(min(self.examples, 4) if self.examples > 1 else 0):
            rows = list(range(self.examples))
            rows[position] = (position + 1) % self.examples
            yield position, self.of(rows)


@dataclass(frozen=True)
class StepBatch:
    """The examples of one step of R runs.

    Args:
        indices: Data set indices ``(runs, B)``, with all micro-batches concatenated; shorter steps are padded with
            zeros.
        passes: Micro-batches of each run.
        leaves: Function that returns the tensors of micro-batch number i of all runs, each ``(runs, B, ...)``, or
            ``None`` if the batches do not consist of tensors of one shape. Used for stacking.
    """

    indices: Tensor
    passes: list[list[MicroBatchInputs]]
    leaves: Callable[[int], list[Tensor] | None]

    @classmethod
    def of(
        cls,
        indices: Sequence[Tensor],
        passes: list[list[MicroBatchInputs]],
        device: torch.device,
        leaves: Callable[[int], list[Tensor] | None] = lambda number: None,
    ) -> StepBatch:
        """Combine the steps of several runs; ``indices`` has one tensor ``(B,)`` for each run."""
        return cls(pad_sequence(list(indices), batch_first=True).to(device), passes, leaves)

    @property
    def size(self) -> int:
        """Number of examples B in the longest step of the runs."""
        return self.indices.shape[1]


@dataclass(frozen=True)
class Point:
    """The starting point of a step; all tensors of parameter size are ``(runs, P)``.

    Args:
        theta: Parameters.
        states: Optimizer state of each group.
        gradient: Gradient that the optimizer applied.
        unclipped: Gradient before clipping, as far as the adjoint of clipping needs it.
        buffers: Buffers that change from step to step by name, each ``(runs, ...)``; empty if no pass depends on them.
    """

    theta: Tensor
    states: list[State]
    gradient: Tensor
    unclipped: Tensor
    buffers: dict[str, Tensor] = field(default_factory=dict)
