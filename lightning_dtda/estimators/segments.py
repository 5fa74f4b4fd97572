"""Segments of a run's steps, with the total learning rate of each segment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from lightning_dtda.errors import AttributionError
from lightning_dtda.optimizers import State
from lightning_dtda.replay import Replay
from lightning_dtda.trajectory import Run

Cuts = int | Sequence[int]
"""Number of segments with equal numbers of steps, or the first steps of all segments but the first."""


@dataclass(frozen=True)
class Segment:
    r"""The steps from ``first`` to ``last - 1``, whose learning rates sum to :math:`\kappa \operatorname{diag}(s)^2`.

    Args:
        first: First step.
        last: Step after the last one.
        middle: Step at which half of the sum of learning rates is reached.
        total: :math:`\kappa`; zero if all learning rates are zero.
        scale: s ``(P,)``; ``None`` for s = 1, if all parameters have the same rate.
        decay: Sum of decoupled weight decay divided by :math:`\kappa` ``(P,)``; ``None`` for no decoupled decay.
    """

    first: int
    last: int
    middle: int
    total: float
    scale: Tensor | None = None
    decay: Tensor | None = None


def boundaries(cuts: Cuts, run: Run, end: int) -> list[tuple[int, int]]:
    """Cut the steps of a run before ``end`` into segments, as (first step, last step + 1).

    Raises:
        AttributionError: If the run has too few steps.
    """
    if isinstance(cuts, int):
        if cuts > end:
            raise AttributionError(
                f"segments={cuts}; {run.path} has only {end} steps before the measurement. Give at most {end}."
            )
        starts = [number * end // cuts for number in range(cuts)]
    else:
        starts = [0, *cuts]
        if starts[-1] >= end:
            raise AttributionError(
                f"segments={list(cuts)}; in {run.path} no segment can start at step {starts[-1]}, because the "
                f"parameters are measured after {end} steps. Give smaller steps."
            )
    return list(pairwise([*starts, end]))


def segment(replay: Replay, first: int, last: int) -> Segment:
    """Sum the recorded learning rates of one run's steps.

    Raises:
        AttributionError: If the optimizer's rates are not available, if it maximizes, or if some parameter groups have
            a learning rate of zero while others do not.
    """
    run = replay.runs[0]
    rates = _rates(replay, first, last)
    way = rates.mean(1)
    middle = first + int((way.cumsum(0) - way / 2 - way.sum() / 2).abs().argmin())
    totals = rates.sum(0)
    if not bool(totals.any()):
        return Segment(first, last, middle, 0.0)
    if not bool((totals > 0).all()):
        raise AttributionError(
            f"In {run.path}, some parameter groups have a learning rate of zero in all steps from {first} to "
            f"{last - 1}, and others do not. Use fewer segments, or UnrolledDifferentiation()."
        )
    decays = torch.tensor(
        [
            [replay.update.update.decoupled_decay(group, t) for group in run.hyperparameters(t)]
            for t in range(first, last)
        ],
        dtype=torch.float64,
    ).sum(0)
    preconditioner = _preconditioner(replay, middle)
    if preconditioner is None and len(totals.unique()) == 1 and not bool(decays.any()):
        return Segment(first, last, middle, float(totals[0]))
    matrix = replay.update.by_parameter(totals).to(replay.device)
    if preconditioner is not None:
        matrix *= preconditioner
    total = float(matrix.mean())
    return Segment(
        first,
        last,
        middle,
        total,
        (matrix / total).sqrt().to(replay.dtype),
        (replay.update.by_parameter(decays) / total).to(replay.device, replay.dtype) if bool(decays.any()) else None,
    )


def _rates(replay: Replay, first: int, last: int) -> Tensor:
    """Return the effective learning rate of each step and parameter group ``(steps, groups)``, for the mean loss."""
    run, update = replay.runs[0], replay.update.update
    if any(group.get("maximize") for group in run.hyperparameters(first)):
        raise AttributionError(
            f"The optimizer of {run.path} maximizes, which Source does not support. Use UnrolledDifferentiation()."
        )
    # coefficients sum to one, except where the end of an epoch cut the accumulation of gradients short
    return torch.stack(
        [
            run.coefficients(step).sum()
            * torch.tensor([update.rate(group, step) for group in run.hyperparameters(step)], dtype=torch.float64)
            for step in range(first, last)
        ]
    )


def _preconditioner(replay: Replay, step: int) -> Tensor | None:
    """Return the factors ``(P,)`` by which the optimizer multiplies gradients at a step; ``None`` if all are one."""
    hyperparameters, update = replay.hyperparameters(step), replay.update

    def found(states: Sequence[State]) -> Tensor | None:
        preconditioner = update.preconditioner(states, hyperparameters, step=step)
        return None if preconditioner is None else preconditioner[0].double()

    if found(replay.checkpoint(0)[1]) is None:
        return None
    point = replay.point(step)
    return found(update.step(point.theta, point.states, point.gradient, hyperparameters, step=step)[1])
