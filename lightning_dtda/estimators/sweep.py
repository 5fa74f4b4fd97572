"""The reverse sweep: adjoints carried back through the steps of recorded runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_dtda.errors import ReplayError
from lightning_dtda.estimators.estimator import Advance
from lightning_dtda.optimizers import State
from lightning_dtda.replay import Replay

Enter: TypeAlias = Callable[[int, Tensor, dict[str, Tensor]], tuple[Tensor, dict[str, Tensor]]]
"""Adds to the adjoints of parameters and running statistics what enters at a step."""

_GROWN = 2.0
"""With horizon="auto", a sweep ends where the adjoint of every run is so many times longer than at its shortest."""


def sweep(
    replay: Replay,
    adjoint: Tensor,
    statistics_adjoint: dict[str, Tensor],
    examples: int,
    horizon: int | str | None,
    advance: Advance,
    end: int | None = None,
) -> tuple[Tensor, dict[int, Tensor]]:
    """Carry adjoints ``(runs, queries, P)``, and those of running statistics, back from a step of training.

    Args:
        replay: The runs.
        adjoint: Of the parameters at the end of the sweep ``(runs, queries, P)``.
        statistics_adjoint: Of the running statistics there.
        examples: N.
        horizon: How many steps to go back, as for :class:`~lightning_dtda.estimators.UnrolledDifferentiation`.
        advance: Told of the steps that are done, among them those of the training that are left out.
        end: The step at which the sweep starts its way back; that of the last checkpoint if not given.

    Returns:
        Responses ``(runs, queries, examples)``; and the norms of the adjoint ``(runs, queries)`` by step, where the
        sweep came by a checkpoint or ended.
    """
    runs, queries, _ = adjoint.shape
    responses = adjoint.new_zeros(runs, queries, examples)
    state_adjoints = no_state_cotangents(replay, adjoint)
    end = replay.steps if end is None else end
    enter: Enter | None = None
    if end == replay.steps and replay.averaged_steps:
        # what is measured is an average over steps: its adjoint enters at each of them
        enter = _entering(replay, adjoint, statistics_adjoint)
        nothing = torch.zeros_like(adjoint), {name: torch.zeros_like(c) for name, c in statistics_adjoint.items()}
        adjoint, statistics_adjoint = enter(end, *nothing)
    norms = {end: adjoint.norm(dim=2)}
    shortest = _Shortest(responses) if horizon == "auto" else None
    start = max(0, end - horizon) if isinstance(horizon, int) else 0
    for first, last in reversed(replay.segments):
        if last <= start or first >= end or (shortest is not None and shortest.is_over):
            advance(runs * (last - first))
            continue
        adjoint, state_adjoints, statistics_adjoint = unroll(
            replay, (first, last), responses, adjoint, state_adjoints, statistics_adjoint, start, end, enter
        )
        norms[max(first, start)] = adjoint.norm(dim=2)
        if shortest is not None:
            shortest.compare(responses, norms[first])
        advance(runs * (last - first))
    if shortest is not None:
        responses = shortest.responses
    if not bool(torch.isfinite(responses).all()):
        raise ReplayError(
            f"The responses of {', '.join(run.name for run in replay.runs)} are not finite: the adjoint overflowed. "
            'Try precision="float64" or horizon="auto", or leave the run out.'
        )
    return responses, norms


def unroll(
    replay: Replay,
    segment: tuple[int, int],
    responses: Tensor,
    adjoint: Tensor,
    state_adjoints: list[State],
    statistics_adjoint: dict[str, Tensor],
    start: int = 0,
    end: int | None = None,
    enter: Enter | None = None,
) -> tuple[Tensor, list[State], dict[str, Tensor]]:
    """Carry adjoints back over the steps between two checkpoints, from ``end`` as far as ``start``.

    Args:
        replay: The runs.
        segment: First step, and the step after the last.
        responses: What the steps add is added to it ``(runs, queries, examples)``.
        adjoint: Of the parameters where it starts ``(runs, queries, P)``.
        state_adjoints: Of each group's optimizer state.
        statistics_adjoint: Of the running statistics.
        start: Steps before it are left out.
        end: Steps from it on are left out; they are replayed all the same, since the record to compare with is that of
            the segment's end.
        enter: Adds to the adjoints what enters at a step.

    Returns:
        The three adjoints at the first step.
    """
    first, last = segment
    buffers = replay.buffers(first)
    for step, point in replay.backwards(first, last, None if end is None else min(last, end)):
        if step < start:
            break
        adjoint, state_adjoints, of_gradient = replay.adjoint(step, point, adjoint, state_adjoints)
        indices, found = replay.directional(step, point, of_gradient, buffers, statistics_adjoint)
        statistics_adjoint = found.statistics_cotangents
        responses.scatter_add_(2, indices[:, None].expand(-1, adjoint.shape[1], -1), -found.terms)
        adjoint = found.products.add_(adjoint)
        del point, found, of_gradient  # the next step takes the memory
        if enter is not None:
            adjoint, statistics_adjoint = enter(step, adjoint, statistics_adjoint)
    return adjoint, state_adjoints, statistics_adjoint


def _entering(replay: Replay, adjoint: Tensor, statistics_adjoint: dict[str, Tensor]) -> Enter:
    """Return what adds the adjoint of an average to that of the steps it is made of."""
    coefficients = replay.averaged_steps

    def enter(step: int, current: Tensor, statistics: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        if coefficient := coefficients.get(step, 0.0):
            current = current + coefficient * adjoint
        if coefficient := replay.averages_statistics(step):
            statistics = {name: part + coefficient * statistics_adjoint[name] for name, part in statistics.items()}
        return current, statistics

    return enter


class _Shortest:
    """The responses of each run and query where the adjoint was shortest so far.

    Args:
        responses: What they are before the first checkpoint is passed ``(runs, queries, examples)``.
    """

    def __init__(self, responses: Tensor) -> None:
        self.responses = responses.clone()
        self._norms = responses.new_full(responses.shape[:2], torch.inf)
        self.is_over = False

    def compare(self, responses: Tensor, norms: Tensor) -> None:
        """Take the responses where the adjoint ``(runs, queries)`` is shorter than ever at this checkpoint."""
        shorter = norms < self._norms
        self.responses[shorter] = responses[shorter]
        self._norms = torch.where(shorter, norms, self._norms)
        # not "all above": an adjoint that overflowed compares false with everything, and does not come back
        self.is_over = not bool((norms <= _GROWN * self._norms).any())


def no_state_cotangents(replay: Replay, cotangents: Tensor) -> list[State]:
    """Return zero cotangents for each group's optimizer state, after the last step."""
    return [
        {key: part.new_zeros(*cotangents.shape[:-1], part.shape[-1]) for key, part in state.items()}
        for state in replay.checkpoint(replay.steps)[1]
    ]
