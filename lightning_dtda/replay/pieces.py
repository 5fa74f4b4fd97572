"""Rebuilding a range of steps that does not fit in memory: piece by piece, recursively."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from lightning_dtda.optimizers import State
from lightning_dtda.replay.steps import Point

if TYPE_CHECKING:
    from lightning_dtda.replay.replay import Replay

FEWEST_HELD = 4
"""Minimum number of steps to hold in memory; with fewer, a range of steps could not be cut into shorter pieces."""


def piece_length(steps: int, held: float) -> int:
    """Return the length of the pieces into which to cut a range of steps if ``held`` steps fit in memory.

    Half of that memory is for the starting points of the pieces, the other half for the steps inside a piece.

    Example:
        >>> piece_length(8, held=8), piece_length(100, held=8), piece_length(1000, held=8)
        (8, 25, 250)
    """
    if steps <= held:
        return steps
    return math.ceil(steps / min(held // 2, math.ceil(steps / (held // 2))))


def left_to_hold(held: float, starts: int) -> float:
    """Return how many steps fit in memory next to the starting points of some pieces."""
    return max(FEWEST_HELD, held - starts)


@cache
def rebuilt_steps(steps: int, held: float) -> int:
    """Return how many forward steps it takes to visit all steps of a range, from the last to the first.

    Example:
        >>> rebuilt_steps(8, held=8), rebuilt_steps(16, held=8), rebuilt_steps(2000, held=32)
        (8, 32, 6202)
    """
    piece = piece_length(steps, held)
    if piece >= steps:
        return steps
    begins = range(0, steps, piece)
    return steps + sum(
        rebuilt_steps(min(piece, steps - begin), left_to_hold(held, number)) for number, begin in enumerate(begins)
    )


class Start(NamedTuple):
    """The state of a training before a range of steps.

    Args:
        theta: Parameters ``(runs, P)``.
        states: Each group's optimizer state.
        buffers: Buffers and frozen parameters, each ``(runs, ...)``.
    """

    theta: Tensor
    states: list[State]
    buffers: dict[str, Tensor]


def visit_backwards(
    replay: Replay, first: int, last: int, stop: int, start: Start, compares: bool = False, held: float | None = None
) -> Iterator[tuple[int, Point]]:
    """Yield a range of steps with their starting points, from the last to the first.

    Args:
        replay: The replay; holds at most :attr:`Replay.held` steps in memory.
        first: First step.
        last: Step after the last that is replayed, if the end is compared with the record.
        stop: First step not to yield.
        start: State before the first step.
        compares: Whether to compare the end with the record.
        held: Number of steps to hold in memory, if other than that of the replay.
    """
    held = max(FEWEST_HELD, replay.held) if held is None else held
    piece = piece_length(stop - first, held)
    points, starts = _rebuilt(replay, first, last if compares else stop, stop, piece, start, compares)
    if points:
        replay.expect(range(stop - 1, first - 1, -1))
    while points:
        yield first + len(points) - 1, points.pop()()
    while starts:
        begin = first + piece * (len(starts) - 1)
        end = min(begin + piece, stop)
        # popped in the call: a local name would keep the starting point alive longer than the call needs it
        yield from visit_backwards(replay, begin, end, end, starts.pop(), held=left_to_hold(held, len(starts)))


def _rebuilt(
    replay: Replay, first: int, last: int, stop: int, piece: int, start: Start, compares: bool
) -> tuple[list[Callable[[], Point]], list[Start]]:
    """Return the starting points of the steps before ``stop`` if they are one piece, else those of the pieces."""
    points: list[Callable[[], Point]] = []
    starts: list[Start] = []
    theta, states, buffers = start
    if not replay.rebuilds_from_gradients:
        replay.expect(range(first, last))
    for step in range(first, last):
        if step < stop and piece < stop - first and (step - first) % piece == 0:
            starts.append(Start(theta, states, buffers))
        point, buffers = replay.point_at(step, theta, states, buffers)
        if step < stop and not starts:
            points.append(replay.held_point(step, point))
        theta, states = replay.advance(step, point)
    if compares:
        replay.compare(first, last, start.theta, theta)
    return points, starts
