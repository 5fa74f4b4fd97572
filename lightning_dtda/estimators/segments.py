"""Stretches of a run's steps, each taken as one: how far its gradients moved the parameters in all."""

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
"""A number of segments with equally many steps, or the steps at which all but the first begin."""


@dataclass(frozen=True)
class Segment:
    r"""The steps from ``first`` to ``last - 1``, whose rates add up to :math:`\kappa \operatorname{diag}(s)^2`.

    Args:
        first: The first step.
        last: The step after the last.
        middle: The step at which half of the way is gone.
        total: :math:`\kappa`; zero where no step moved the parameters.
        scale: s ``(P,)``; ``None`` where all parameters move at the same rate, for s = 1.
        decay: What decoupled weight decay took of the parameters, over :math:`\kappa` ``(P,)``; ``None`` for nothing.
    """

    first: int
    last: int
    middle: int
    total: float
    scale: Tensor | None = None
    decay: Tensor | None = None


def boundaries(cuts: Cuts, run: Run, end: int) -> list[tuple[int, int]]:
    """Cut the steps of a run before ``end`` into stretches, as (first step, last step + 1).

    Raises:
        AttributionError: If there are not so many steps.
    """
    if isinstance(cuts, int):
        if cuts > end:
            raise AttributionError(
                f"segments={cuts}; {run.path} has {end} steps before step {end}. Give at most so many."
            )
        starts = [number * end // cuts for number in range(cuts)]
    else:
        starts = [0, *cuts]
        if starts[-1] >= end:
            raise AttributionError(
                f"segments={list(cuts)}; in {run.path} no segment can begin at step {starts[-1]}, since responses are "
                f"asked for after {end} steps. Give smaller steps."
            )
    return list(pairwise([*starts, end]))


def segment(replay: Replay, first: int, last: int) -> Segment:
    """Sum up the rates of one run's steps, as they were recorded.

    Raises:
        AttributionError: If the optimizer does not say how far a gradient moves the parameters, if it maximizes, or if
            some parameters do not move while others do.
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
            f"In {run.path}, some parameter groups have a learning rate of zero throughout the steps {first} to "
            f"{last - 1}, others have not. Cut the run into fewer segments, or use UnrolledDifferentiation()."
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
    """Return how far each step moves each parameter group for a gradient of the mean loss ``(steps, groups)``."""
    run, update = replay.runs[0], replay.update.update
    if any(group.get("maximize") for group in run.hyperparameters(first)):
        raise AttributionError(
            f"The optimizer of {run.path} maximizes, for which Source has no curvature. Use UnrolledDifferentiation()."
        )
    # coefficients sum up to one, but for those of gradients that an epoch's end kept from being accumulated in full
    return torch.stack(
        [
            run.coefficients(step).sum()
            * torch.tensor([update.rate(group, step) for group in run.hyperparameters(step)], dtype=torch.float64)
            for step in range(first, last)
        ]
    )


def _preconditioner(replay: Replay, step: int) -> Tensor | None:
    """Return what the optimizer multiplies gradients by at a step ``(P,)``; ``None`` for one."""
    hyperparameters, update = replay.hyperparameters(step), replay.update

    def found(states: Sequence[State]) -> Tensor | None:
        preconditioner = update.preconditioner(states, hyperparameters, step=step)
        return None if preconditioner is None else preconditioner[0].double()

    if found(replay.checkpoint(0)[1]) is None:
        return None
    point = replay.point(step)
    return found(update.step(point.theta, point.states, point.gradient, hyperparameters, step=step)[1])
