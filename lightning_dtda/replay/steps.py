"""One step of some runs: the micro-batches that make it, made again, and what the step starts from."""

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
"""Tensors by name: buffers and frozen parameters, or what belongs to BatchNorm's running statistics."""


@dataclass(frozen=True)
class MicroBatchInputs:
    """What a pass of a run is made of.

    Args:
        examples: B.
        time: The Trainer's.
        states: Of the generators before the pass; none where it drew nothing.
        make: Makes the batch, as the ``collate_fn`` made it, of some of its rows, by their positions.
        factor: What its loss is multiplied with in the step's.
        keeps_statistics: Whether running statistics are those after this pass: in the first process of a training,
            whose buffers the others get.
    """

    examples: int
    time: Time
    states: ByName
    make: Callable[[Sequence[int]], Any]
    factor: float = 1.0
    keeps_statistics: bool = True

    def batch(self) -> Any:
        """Return the batch as it was."""
        return self.make(range(self.examples))

    def of(self, rows: Sequence[int]) -> MicroBatchInputs:
        """Return the inputs of a pass of some rows, by their positions."""
        return replace(self, examples=len(rows), make=lambda some: self.make([rows[row] for row in some]))

    def less_or_more(self) -> Iterator[MicroBatchInputs]:
        """Yield the batch with one example left out, or repeated where it is small, all choices of it."""
        rows = list(range(self.examples))
        if self.examples > 2:
            # spread over the batch first: a few are mostly enough
            spread = [0, self.examples // 2, self.examples - 1]
            for row in dict.fromkeys([*spread, *rows]):
                yield self.of(rows[:row] + rows[row + 1 :])
        for row in rows:
            yield self.of([*rows, row])

    def replaced(self) -> Iterator[tuple[int, MicroBatchInputs]]:
        """Yield the batch with one example in place of another, a few choices of it, and which one is gone."""
        for position in range(min(self.examples, 4) if self.examples > 1 else 0):
            rows = list(range(self.examples))
            rows[position] = (position + 1) % self.examples
            yield position, self.of(rows)


@dataclass(frozen=True)
class StepBatch:
    """The examples of one step of R runs.

    Args:
        indices: Data set indices ``(runs, B)``, those of all micro-batches one after the other; shorter steps are
            filled up with zeros.
        passes: The micro-batches of each run.
        leaves: For stacks, makes the tensors of micro-batch number i of all runs, each ``(runs, B, ...)``; ``None``
            where the batches do not consist of tensors of one shape.
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
        """Put the steps of some runs together; ``indices`` has one ``(B,)`` for each."""
        return cls(pad_sequence(list(indices), batch_first=True).to(device), passes, leaves)

    @property
    def size(self) -> int:
        """B, of the longest of the runs' steps."""
        return self.indices.shape[1]


@dataclass(frozen=True)
class Point:
    """What a step starts from, each ``(runs, P)``.

    Args:
        theta: Parameters.
        states: Each group's optimizer state.
        gradient: What the optimizer applied.
        unclipped: The same before clipping, as far as the adjoint of clipping needs it.
        buffers: Those that change from step to step by name, each ``(runs, ...)``; none where no pass depends on them.
    """

    theta: Tensor
    states: list[State]
    gradient: Tensor
    unclipped: Tensor
    buffers: dict[str, Tensor] = field(default_factory=dict)
