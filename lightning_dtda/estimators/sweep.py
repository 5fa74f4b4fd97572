"""The reverse sweep: adjoints, propagated backwards through the steps of recorded runs."""

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
"""Function that adds a step's contribution to the adjoints of parameters and running statistics."""

_GROWN = 2.0
"""With horizon="auto", a sweep ends when the norm of every adjoint exceeds its minimum by this factor."""


@dataclass
class Adjoints:
    """Adjoints that a sweep updates in place. Other references to the tensors would keep more of them in memory.

    Args:
        theta: Adjoints of the parameters ``(runs, queries, P)``.
        statistics: Adjoints of the running statistics.
        states: Adjoints of the optimizer state of each parameter group.
    """

    theta: Tensor
    statistics: dict[str, Tensor]
    states: list[State]

    @classmethod
    def at_end(cls, replay: Replay, theta: Tensor, statistics: dict[str, Tensor]) -> Adjoints:
        """Return the adjoints of a measurement, which does not depend on optimizer states."""
        return cls(theta, statistics, no_state_cotangents(replay, theta))


def sweep(
    replay: Replay,
    adjoints: Adjoints,
    examples: int,
    horizon: int | str | None,
    advance: Advance,
    end: int | None = None,
) -> tuple[Tensor, dict[int, Tensor]]:
    """Propagate adjoints backwards from a step of training.

    Args:
        replay: Replay of the runs.
        adjoints: Adjoints at ``end``; updated in place.
        examples: Number of training examples N.
        horizon: Number of steps to go back, see :class:`~lightning_dtda.estimators.UnrolledDifferentiation`.
        advance: Called with the number of steps done, including steps that are left out.
        end: Step at which the sweep starts; the end of training if not given.

    Returns:
        Responses ``(runs, queries, examples)``; and by step, the norms of the adjoint ``(runs, queries)`` at
        checkpoints and at the end of the sweep.
    """
    runs, queries, _ = adjoints.theta.shape
    responses = adjoints.theta.new_zeros(runs, queries, examples)
    end = replay.steps if end is None else end
    enter: Enter | None = None
    if end == replay.steps and replay.records.averaged_steps:
        # an average over steps is measured: its adjoint enters at each of these steps
        enter = _entering(replay, adjoints.theta, adjoints.statistics)
        nothing = {name: torch.zeros_like(part) for name, part in adjoints.statistics.items()}
        adjoints.theta, adjoints.statistics = enter(end, torch.zeros_like(adjoints.theta), nothing)
    norms = {end: adjoints.theta.norm(dim=2)}
    shortest = _Shortest(responses) if horizon == "auto" else None
    start = max(0, end - horizon) if isinstance(horizon, int) else 0
    for first, last in reversed(replay.stretches):
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
    stretch: tuple[int, int],
    responses: Tensor,
    adjoints: Adjoints,
    start: int = 0,
    end: int | None = None,
    enter: Enter | None = None,
) -> None:
    """Propagate adjoints backwards through the steps between two checkpoints, from ``end`` to ``start``.

    Args:
        replay: Replay of the runs.
        stretch: First step, and the step after the last one.
        responses: Responses ``(runs, queries, examples)``, to which the contributions of the steps are added.
        adjoints: Adjoints after the last step; updated in place to those before the first step.
        start: First step to differentiate.
        end: Step after the last one to differentiate. Later steps are still replayed, because the record to compare
            with is at the end of the stretch.
        enter: Function that adds a step's contribution to the adjoints.
    """
    first, last = stretch
    buffers = replay.buffers(first)
    for step, point in replay.backwards(first, last, None if end is None else min(last, end)):
        if step < start:
            break
        adjoints.theta, adjoints.states, of_gradient = replay.adjoint(step, point, adjoints.theta, adjoints.states)
        point = replace(point, states=[])  # large, and no longer needed
        indices, found = replay.directional(step, point, of_gradient, buffers, adjoints.statistics)
        adjoints.statistics = found.statistics_cotangents
        responses.scatter_add_(2, indices[:, None].expand(-1, responses.shape[1], -1), -found.terms)
        adjoints.theta = found.products.add_(adjoints.theta)
        del point, found, of_gradient  # the next step needs the memory
        if enter is not None:
            adjoints.theta, adjoints.statistics = enter(step, adjoints.theta, adjoints.statistics)


def _entering(replay: Replay, adjoint: Tensor, statistics_adjoint: dict[str, Tensor]) -> Enter:
    """Return a function that adds the adjoint of a weight average to the adjoints of the averaged steps."""
    coefficients = replay.records.averaged_steps

    def enter(step: int, current: Tensor, statistics: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        if coefficient := coefficients.get(step, 0.0):
            current = current + coefficient * adjoint
        if coefficient := replay.records.averages_statistics(step):
            statistics = {name: part + coefficient * statistics_adjoint[name] for name, part in statistics.items()}
        return current, statistics

    return enter


class _Shortest:
    """The responses of each run and query at the checkpoint where the norm of the adjoint is smallest so far.

    Args:
        responses: Responses ``(runs, queries, examples)`` before the first checkpoint.
    """

    def __init__(self, responses: Tensor) -> None:
        self.responses = responses.clone()
        self._norms = responses.new_full(responses.shape[:2], torch.inf)
        self.is_over = False

    def compare(self, responses: Tensor, norms: Tensor) -> None:
        """Take the responses where the norm of the adjoint ``(runs, queries)`` is the smallest so far."""
        shorter = norms < self._norms
        self.responses[shorter] = responses[shorter]
        self._norms = torch.where(shorter, norms, self._norms)
        # "not any below" instead of "all above", because comparisons with an overflowed adjoint (NaN) are false
        self.is_over = not bool((norms <= _GROWN * self._norms).any())


def no_state_cotangents(replay: Replay, cotangents: Tensor) -> list[State]:
    """Return zero cotangents for each group's optimizer state, after the last step."""
    return [
        {key: part.new_zeros(*cotangents.shape[:-1], part.shape[-1]) for key, part in state.items()}
        for state in replay.checkpoint(replay.steps)[1]
    ]
