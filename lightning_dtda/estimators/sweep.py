"""The reverse sweep: adjoints carried back through the steps of recorded runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
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


@dataclass
class Adjoints:
    """What is carried back, changed in place: nobody else may hold it, or there are more vectors than needed at once.

    Args:
        theta: Of the parameters ``(runs, queries, P)``.
        statistics: Of the running statistics.
        states: Of each group's optimizer state.
    """

    theta: Tensor
    statistics: dict[str, Tensor]
    states: list[State]

    @classmethod
    def at_end(cls, replay: Replay, theta: Tensor, statistics: dict[str, Tensor]) -> Adjoints:
        """Return those of a measurement, in which optimizer states do not enter."""
        return cls(theta, statistics, no_state_cotangents(replay, theta))


def sweep(
    replay: Replay,
    adjoints: Adjoints,
    examples: int,
    horizon: int | str | None,
    advance: Advance,
    end: int | None = None,
) -> tuple[Tensor, dict[int, Tensor]]:
    """Carry adjoints ``(runs, queries, P)``, and those of running statistics, back from a step of training.

    Args:
        replay: The runs.
        adjoints: At the end of the sweep; used up.
        examples: N.
        horizon: How many steps to go back, as for :class:`~lightning_dtda.estimators.UnrolledDifferentiation`.
        advance: Told of the steps that are done, among them those of the training that are left out.
        end: The step at which the sweep starts its way back; that of the last checkpoint if not given.

    Returns:
        Responses ``(runs, queries, examples)``; and the norms of the adjoint ``(runs, queries)`` by step, where the
        sweep came by a checkpoint or ended.
    """
    runs, queries, _ = adjoints.theta.shape
    responses = adjoints.theta.new_zeros(runs, queries, examples)
    end = replay.steps if end is None else end
    enter: Enter | None = None
    if end == replay.steps and replay.averaged_steps:
        # what is measured is an average over steps: its adjoint enters at each of them
        enter = _entering(replay, adjoints.theta, adjoints.statistics)
        nothing = {name: torch.zeros_like(part) for name, part in adjoints.statistics.items()}
        adjoints.theta, adjoints.statistics = enter(end, torch.zeros_like(adjoints.theta), nothing)
    norms = {end: adjoints.theta.norm(dim=2)}
    shortest = _Shortest(responses) if horizon == "auto" else None
    start = max(0, end - horizon) if isinstance(horizon, int) else 0
    for first, last in reversed(replay.segments):
        if last <= start or first >= end or (shortest is not None and shortest.is_over):
            advance(runs * (last - first))
            continue
        unroll(replay, (first, last), responses, adjoints, start, end, enter)
        norms[max(first, start)] = adjoints.theta.norm(dim=2)
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
    adjoints: Adjoints,
    start: int = 0,
    end: int | None = None,
    enter: Enter | None = None,
) -> None:
    """Carry adjoints back over the steps between two checkpoints, from ``end`` as far as ``start``.

    Args:
        replay: The runs.
        segment: First step, and the step after the last.
        responses: What the steps add is added to it ``(runs, queries, examples)``.
        adjoints: Where it starts; made those at the first step.
        start: Steps before it are left out.
        end: Steps from it on are left out; they are replayed all the same, since the record to compare with is that of
            the segment's end.
        enter: Adds to the adjoints what enters at a step.
    """
    first, last = segment
    buffers = replay.buffers(first)
    for step, point in replay.backwards(first, last, None if end is None else min(last, end)):
        if step < start:
            break
        adjoints.theta, adjoints.states, of_gradient = replay.adjoint(step, point, adjoints.theta, adjoints.states)
        point = replace(point, states=[])  # large, and not needed any more
        indices, found = replay.directional(step, point, of_gradient, buffers, adjoints.statistics)
        adjoints.statistics = found.statistics_cotangents
        responses.scatter_add_(2, indices[:, None].expand(-1, responses.shape[1], -1), -found.terms)
        adjoints.theta = found.products.add_(adjoints.theta)
        del point, found, of_gradient  # the next step takes the memory
        if enter is not None:
            adjoints.theta, adjoints.statistics = enter(step, adjoints.theta, adjoints.statistics)


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
