"""The forward sweep: tangents of removals carried through the steps of recorded runs."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor

from lightning_dtda.errors import ReplayError
from lightning_dtda.estimators.estimator import Advance
from lightning_dtda.estimators.measuring import places
from lightning_dtda.estimators.memory import kept_pages, peak_memory
from lightning_dtda.replay import Examples, Measurement, Position, Replay, Tangents
from lightning_dtda.replay.measured import measured
from lightning_dtda.replay.tangents import changes

_TIMED_STEPS = 4
"""Steps whose fastest is taken as the time of a step: the first one warms up, others may be disturbed."""


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
                _check(replay, position)
                yield position
        advance(runs * (last - first))


def estimate_forward(
    replay: Replay,
    membership: Tensor,
    queries: Examples,
    measurement: Measurement,
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
        queries: Q queries, in the replay's precision and on its device.
        measurement: m.
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
    for chunk in chunks:
        for position in forward_sweep(replay, chunk, (step,), start, lambda steps: advance(steps / len(chunks))):
            parts = [
                _answer(replay, position, queries.fetch(numbers), measurement)
                for numbers in torch.arange(len(queries)).split(queries_per_chunk)
            ]
            baseline = torch.cat([values for values, _ in parts], 1)
            responses.append(torch.cat([changes for _, changes in parts], 1))
    return baseline, torch.cat(responses, 2)


def _answer(replay: Replay, position: Position, batch: Any, measurement: Measurement) -> tuple[Tensor, Tensor]:
    where = places(replay, position.step)
    values, gradients, of_statistics = measured(
        replay.module, position.theta, position.buffers, batch, measurement, where
    )
    return values, changes(gradients, of_statistics, position.tangents)


def _read(replay: Replay, first: int, start: int, removals: int, before: Position | None) -> Position:
    """Return where a sweep is at the start of a segment: as recorded, the tangents those it has come with."""
    theta, states = replay.checkpoint(first)
    buffers = replay.buffers(first)
    if first < start:
        point = replay.point(start)
        theta, states = point.theta, point.states
        if replay.module.statistics:  # what the steps left out made of them is part of the model that is measured
            buffers = replay.trained(start)[1]
    tangents = (
        Tangents.zeros(theta, states, replay.statistics(buffers), removals) if before is None else before.tangents
    )
    return Position(max(first, start), theta, states, buffers, tangents)


def _check(replay: Replay, position: Position) -> None:
    if not bool(torch.isfinite(position.tangents.theta).all()):
        raise ReplayError(
            f"The responses of {', '.join(run.name for run in replay.runs)} are not finite after {position.step} "
            'steps: they overflowed. Try precision="float64" or a horizon, or leave the run out.'
        )


def forward_memory(replay: Replay, queries: int, removals: int) -> tuple[float, float]:
    """Measure the bytes that a run needs whatever the removals, and what each of a chunk's removals adds.

    A query is measured with less than a removal is pushed with: a pass of one example to a pass of a batch.
    """
    peaks = []
    for count in (1, 2):
        position, membership = _example(replay, count)

        def push(position: Position = position, membership: Tensor = membership) -> object:
            return replay.push(position, membership)

        push()  # what the first call reads and keeps is none of a step's memory
        peaks.append(peak_memory(push, replay.device))
    vector = replay.layout.size * replay.dtype.itemsize
    states = sum(len(state) for state in position.states)
    per_removal = max(peaks[1] - peaks[0], vector)
    # parameters and state twice, before and after; the responses, and what is kept to join the chunks
    per_run = max(peaks[0] - per_removal, 0) + 2 * (1 + states) * vector
    per_run += 2 * queries * removals * replay.dtype.itemsize
    # which examples the removals have, all of them at once
    per_run += removals * len(replay.examples) * replay.dtype.itemsize
    return per_run, per_removal + (1 + states) * vector


def forward_seconds_per_step(replay: Replay, removals: int) -> float:
    """Time a step of the sweep."""
    position, membership = _example(replay, removals)
    fastest = float("inf")
    with kept_pages(replay.device):
        for _ in range(_TIMED_STEPS):
            start = time.perf_counter()
            replay.push(position, membership).tangents.theta[0, 0, 0].item()  # waits for the device
            fastest = min(fastest, time.perf_counter() - start)
    return fastest


def _example(replay: Replay, removals: int) -> tuple[Position, Tensor]:
    """Return the start of the training with some removals, for measuring costs."""
    position = _read(replay, 0, 0, removals, None)
    return position, position.theta.new_ones(removals, len(replay.examples))
