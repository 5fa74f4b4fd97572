"""One step of stacked runs: the examples that make it, how they pass through the module, and what it starts from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lightning_dtda.errors import ReplayError
from lightning_dtda.optimizers import State
from lightning_dtda.replay.batches import map_tensors
from lightning_dtda.replay.dropout import Dropout, Mask
from lightning_dtda.replay.functional import FunctionalModule
from lightning_dtda.trajectory import MicroBatch


class Part(NamedTuple):
    """Examples that pass through the module together.

    Args:
        size: Their number.
        keeps_statistics: Whether running statistics are those after this pass: in the first process of a training,
            whose buffers the others get.
    """

    size: int
    keeps_statistics: bool = True


@dataclass(frozen=True)
class StepBatch:
    """The examples of one step of R runs; shorter batches are filled up with examples of coefficient 0.

    Args:
        indices: Data set indices ``(runs, B)``.
        coefficients: What each example's loss is multiplied with in the step's loss ``(runs, B)``.
        examples: The examples, each leaf ``(runs, B, ...)``.
        batch_idx: As ``training_step`` got it.
        masks: Those of dropout, each part ``(runs, B, ...)``.
        parts: The examples that pass through the module together: all of them, since the loss of an example does not
            depend on the others; or those of each micro-batch, where BatchNorm makes it depend on them.
    """

    indices: Tensor
    coefficients: Tensor
    examples: Any
    batch_idx: int
    masks: list[Mask]
    parts: list[Part]


@dataclass(frozen=True)
class Point:
    """What a step starts from, each ``(runs, P)``.

    Args:
        theta: Parameters.
        states: Each group's optimizer state.
        gradient: What the optimizer applied.
        unclipped: The same before clipping, as far as the adjoint of clipping needs it.
    """

    theta: Tensor
    states: list[State]
    gradient: Tensor
    unclipped: Tensor


def parts_of(step: int, micro_batches: list[list[MicroBatch]], has_statistics: bool) -> list[Part]:
    """Return which examples of a step's micro-batches, for each run, pass through the module together.

    Raises:
        ReplayError: If BatchNorm makes them depend on each other, and the runs differ in the sizes of their batches.
    """
    sizes = [[Part(len(part.indices), part.process == 0) for part in parts] for parts in micro_batches]
    if not has_statistics:
        return [Part(max(sum(part.size for part in of_run) for of_run in sizes))]
    if any(of_run != sizes[0] for of_run in sizes):
        raise ReplayError(
            f"The runs have batches of different sizes at step {step}. With BatchNorm, whose statistics are those "
            "of a batch, such runs cannot be swept together: give the estimator runs_per_batch=1."
        )
    return sizes[0]


def draw_masks(
    dropout: Dropout, step: int, names: Sequence[str], micro_batches: list[list[MicroBatch]], dtype: torch.dtype
) -> list[Mask]:
    """Draw the dropout masks of a step again, from the states of the generators that its micro-batches started with.

    Args:
        dropout: What the module draws.
        step: t.
        names: What errors call the runs.
        micro_batches: Those of each run.
        dtype: Of the replay.

    Returns:
        Masks, each part ``(runs, B, ...)``.

    Raises:
        ReplayError: If not all passes of the step drew.
    """
    of_runs: list[list[Mask]] = []
    for name, parts in zip(names, micro_batches, strict=True):
        if not dropout.calls or not all(part.rng_states for part in parts):
            raise ReplayError(
                f"training_step of {name} drew random numbers at step {step}, and not always: not for all "
                "passes of the step, or not at the first step. Let it do so at every step, or at none."
            )
        drawn = [dropout.draw(part.rng_states, len(part.indices), dtype) for part in parts]
        of_runs.append([tuple(map(torch.cat, zip(*masks, strict=True))) for masks in zip(*drawn, strict=True)])
    return [
        tuple(pad_sequence(list(runs), batch_first=True) for runs in zip(*masks, strict=True))
        for masks in zip(*of_runs, strict=True)
    ]


def pass_examples(
    module: FunctionalModule,
    theta: Tensor,
    buffers: dict[str, Tensor],
    examples: Any,
    masks: list[Mask],
    batch: StepBatch,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Pass a run's examples through the module, part by part; return losses ``(B,)`` and running statistics."""
    if len(batch.parts) == 1 and not module.statistics:
        return module.example_losses(theta, buffers, examples, batch.batch_idx, masks), {}
    losses, statistics, start = [], {name: buffers[name] for name in module.statistics}, 0
    for size, keeps_statistics in batch.parts:
        rows = slice(start, start + size)
        start += size
        part, after = module.losses_and_statistics(
            theta,
            buffers | statistics,
            map_tensors(lambda leaf, rows=rows: leaf[rows], examples),  # type: ignore[misc]
            batch.batch_idx,
            [tuple(part[rows] for part in mask) for mask in masks],
        )
        losses.append(part)
        statistics = after if keeps_statistics else statistics
    return torch.cat(losses), statistics
