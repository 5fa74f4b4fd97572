"""The forward sweep: tangents of removals, propagated through the steps of recorded runs."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from lightning_dtda.errors import ReplayError
from lightning_dtda.estimators.estimator import Advance, Question
from lightning_dtda.replay import Position, Replay, Tangents
from lightning_dtda.replay.tangents import changes


def forward_sweep(
    replay: Replay,
    membership: Tensor,
    steps: Collection[int] | None = None,
    start: int = 0,
    advance: Advance = lambda steps: None,
) -> Iterator[Position]:
    r"""Propagate the responses of the parameters forward through training (arXiv 2506.12965, equation 6).

    .. math:: r_{k,t} = -\sum_{n \in S_k} \frac{d \theta_t}{d w_n}, \qquad r_{k,0} = 0

    This is a Markov chain: only the current state is held. Parameters and optimizer state are rebuilt on the way and
    compared with the record at each checkpoint.

    Args:
        replay: Replay of the runs.
        membership: Matrix ``(removals, N)``, 1 where a removal contains an example.
        steps: Steps t at which to yield; the end of training if not given.
        start: First step to differentiate; the effects of removals in earlier steps are left out.
        advance: Called with the number of steps done.

    Yields:
        The position of the sweep at each of the ``steps``; the responses ``(runs, removals, P)`` are the tangents of
        the parameters.

    Raises:
        ReplayError: If the replay deviates from the record, or the responses are not finite.
    """
    wanted = {replay.steps} if steps is None else set(steps)
    runs, stop = len(replay.runs), max(wanted)
    position: Position | None = None
    for first, last in replay.stretches:
        if last <= start or first >= stop:
            advance(runs * (last - first))
            continue
        position = _read(replay, first, start, len(membership), position)
        if position.step == start and start in wanted:
            yield position
        beginning = replay.checkpoint(first)[0]
        while position.step < min(last, stop):
            position = replay.push(position, membership)
            if position.step == last:
                replay.compare(first, last, beginning, position.theta)
            if position.step in wanted:
                if not bool(torch.isfinite(position.tangents.theta).all()):
                    raise ReplayError(
                        f"The responses of {', '.join(run.name for run in replay.runs)} are not finite after "
                        f'{position.step} steps: they overflowed. Try precision="float64" or a horizon, or leave the '
                        "run out."
                    )
                yield position
        advance(runs * (last - first))


def estimate_forward(
    replay: Replay,
    membership: Tensor,
    question: Question,
    *,
    removals_per_chunk: int,
    queries_per_chunk: int,
    start: int = 0,
    step: int | None = None,
    advance: Advance = lambda steps: None,
) -> tuple[Tensor, Tensor]:
    r"""Return the responses of measurements by forward sweeps, one for each chunk of removals.

    .. math:: r_{qk} = \langle \nabla m_q(\theta_t), r_{k,t} \rangle

    plus the effect of removals through the running statistics of BatchNorm.

    Args:
        replay: Replay of the runs.
        membership: Matrix ``(removals, N)``, 1 where a removal contains an example.
        question: The question, with queries and measurement.
        removals_per_chunk: Number of removals that are propagated together.
        queries_per_chunk: Number of queries that are measured together.
        start: First step to differentiate; the effects of removals in earlier steps are left out.
        step: Step t at which to measure; the end of training if not given.
        advance: Called with the number of steps done.

    Returns:
        The baseline :math:`m(\theta_t)` ``(runs, queries)``, and responses ``(runs, queries, removals)``.

    Raises:
        ReplayError: See :func:`forward_sweep`.
        AttributionError: If the measurement cannot be differentiated or is not finite.
    """
    step = replay.steps if step is None else step
    chunks = membership.split(removals_per_chunk)
    baseline, responses = torch.empty(0), []
    averaged = set(replay.records.averaged_steps) if step == replay.steps else set()
    for chunk in chunks:
        average: Tangents | None = None
        for position in forward_sweep(
            replay, chunk, averaged | {step}, start, lambda steps: advance(steps / len(chunks))
        ):
            if averaged:
                average = _added(replay, average, position)
            if position.step != step:
                continue
            if average is not None:
                position = replace(position, tangents=average)
            parts = [
                _answer(replay, position, question, numbers.tolist())
                for numbers in torch.arange(len(question.queries)).split(queries_per_chunk)
            ]
            baseline = torch.cat([values for values, _ in parts], 1)
            responses.append(torch.cat([changes for _, changes in parts], 1))
    return baseline, torch.cat(responses, 2)


def _added(replay: Replay, average: Tangents | None, position: Position) -> Tangents:
    """Add the tangents of a step to the tangents of the weight average that training ended with."""
    found = position.tangents
    of_theta = replay.records.averaged_steps.get(position.step, 0.0)
    of_statistics = replay.records.averages_statistics(position.step)
    theta = of_theta * found.theta
    statistics = {name: of_statistics * part for name, part in found.statistics.items()}
    if average is not None:
        theta += average.theta
        statistics = {name: part + average.statistics[name] for name, part in statistics.items()}
    return Tangents(theta, found.states, statistics)


def _answer(replay: Replay, position: Position, question: Question, numbers: list[int]) -> tuple[Tensor, Tensor]:
    is_average = position.step == replay.steps and bool(replay.records.averaged_steps)
    values, gradients, of_statistics = question.measure_with_gradients(
        replay, numbers, position.step, None if is_average else (position.theta, position.buffers)
    )
    return values, changes(gradients, of_statistics, position.tangents)


def _read(replay: Replay, first: int, start: int, removals: int, before: Position | None) -> Position:
    """Return the position at the start of a stretch: the state as recorded, the tangents from the sweep so far."""
    theta, states = replay.checkpoint(first)
    buffers = replay.buffers(first)
    if first < start:
        point = replay.point(start)
        theta, states = point.theta, point.states
        buffers = replay.trained(start)[1]  # skipped steps still update the buffers
    tangents = (
        Tangents.zeros(theta, states, replay.statistics(buffers), removals) if before is None else before.tangents
    )
    return Position(max(first, start), theta, states, buffers, tangents)


def example_position(replay: Replay, removals: int) -> tuple[Position, Tensor]:
    """Return the start of training, with removals of all examples, for trials of what steps cost."""
    position = _read(replay, 0, 0, removals, None)
    return position, position.theta.new_ones(removals, len(replay.examples))
