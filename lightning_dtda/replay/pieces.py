"""Rebuilding a range of steps that does not fit in memory: piece by piece, recursively."""

from __future__ import annotations

import math
from functools import cache

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
