"""The forward sweep: tangents of removals carried through the steps of recorded runs."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from lightning_dtda.errors import ReplayError
from lightning_dtda.estimators.estimator import Advance, Question
from lightning_dtda.estimators.measuring import measure_at
from lightning_dtda.replay import Position, Replay, Tangents
from lightning_dtda.replay.tangents import changes


def forward_sweep(
    replay: Replay,
    membership: Tensor,
    steps: Collection[int] | None = None,
    start: int = 0,
    advance: Advance = lambda steps: None,
) -> Iterator[Position]:
    r"""Carry the responses of the parameters forwards through a training (arXiv 2506.12965, equation 6).

    .. math:: r_{k,t} = -\sum_{n \in S_k} \frac{d \theta_t}{d w_n}, \qquad r_{k,0} = 0

    A Markov chain: of the steps before, nothing is held but where they have come to. Parameters and optimizer state are
    rebuilt on the way, and compared with the record at each of its checkpoints.

    Args:
        replay: The runs.
        membership: 1 where an example is in a removal ``(removals, N)``.
        steps: Numbers of steps t after which to stop by; the end of training if not given.
        start: Steps before it are left out: what removals did there counts for nothing.
        advance: Told how many steps of runs were done.

    Yields:
        Where the sweep is after each of the ``steps``, the responses ``(runs, removals, P)`` as the tangents of the
        parameters.

    Raises:
        ReplayError: If the replay leaves the record, or the responses are not finite.
    """
    wanted = {replay.steps} if steps is None else set(steps)
    runs, stop = len(replay.runs), max(wanted)
    position: Position | None = None
    for first, last in replay.segments:
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

    with what removals do to the running statistics of BatchNorm on top.

    Args:
        replay: R runs.
        membership: 1 where an example is in a removal ``(removals, N)``.
        question: Q queries and what is measured of them.
        removals_per_chunk: Removals that are carried together.
        queries_per_chunk: Queries that are measured together.
        start: Steps before it are left out.
        step: t, where to measure; the end of training if not given.
        advance: Told how many steps of runs were done.

    Returns:
        The baseline :math:`m(\theta_t)` ``(runs, queries)``, and responses ``(runs, queries, removals)``.

    Raises:
        ReplayError: As :func:`forward_sweep`.
        AttributionError: If the measurement cannot be differentiated or is not finite.
    """
    step = replay.steps if step is None else step
    chunks = membership.split(removals_per_chunk)
    baseline, responses = torch.empty(0), []
    averaged = set(replay.averaged_steps) if step == replay.steps else set()
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
    """Add the tangents of a step to those of the average that the training ended with."""
    found = position.tangents
    of_theta = replay.averaged_steps.get(position.step, 0.0)
    of_statistics = replay.averages_statistics(position.step)
    theta = of_theta * found.theta
    statistics = {name: of_statistics * part for name, part in found.statistics.items()}
    if average is not None:
        theta += average.theta
        statistics = {name: part + average.statistics[name] for name, part in statistics.items()}
    return Tangents(theta, found.states, statistics)


def _answer(replay: Replay, position: Position, question: Question, numbers: list[int]) -> tuple[Tensor, Tensor]:
    theta, buffers = position.theta, position.buffers
    if position.step == replay.steps and replay.averaged_steps:
        theta, buffers = replay.trained(position.step)
    values, gradients, of_statistics = measure_at(replay, theta, buffers, question, numbers, position.step)
    return values, changes(gradients, of_statistics, position.tangents)


def _read(replay: Replay, first: int, start: int, removals: int, before: Position | None) -> Position:
    """Return where a sweep is at the start of a segment: as recorded, the tangents those it has come with."""
    theta, states = replay.checkpoint(first)
    buffers = replay.buffers(first)
    if first < start:
        point = replay.point(start)
        theta, states = point.theta, point.states
        buffers = replay.trained(start)[1]  # what the steps left out made of them is part of the model
    tangents = (
        Tangents.zeros(theta, states, replay.statistics(buffers), removals) if before is None else before.tangents
    )
    return Position(max(first, start), theta, states, buffers, tangents)


def example_position(replay: Replay, removals: int) -> tuple[Position, Tensor]:
    """Return the start of the training with some removals of all examples, for measuring costs."""
    position = _read(replay, 0, 0, removals, None)
    return position, position.theta.new_ones(removals, len(replay.examples))
