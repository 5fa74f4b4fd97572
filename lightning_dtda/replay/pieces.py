"""How a stretch of steps is rebuilt whose steps do not fit memory all at once: piece by piece, and pieces likewise."""

from __future__ import annotations

import math
from functools import cache

FEWEST_HELD = 4
"""Steps that are held in memory at the least; with fewer, a stretch of steps could not be cut into shorter ones."""


def piece_length(steps: int, held: float) -> int:
    """Return the length of the pieces that a stretch of steps is cut into, where ``held`` steps fit memory.

    Half of what fits is for what the pieces start from, the other half for the pieces inside.

    Example:
        >>> piece_length(8, held=8), piece_length(100, held=8), piece_length(1000, held=8)
        (8, 25, 250)
    """
    if steps <= held:
        return steps
    return math.ceil(steps / min(held // 2, math.ceil(steps / (held // 2))))


def left_to_hold(held: float, starts: int) -> float:
    """Return how many steps fit memory beside what some pieces start from."""
    return max(FEWEST_HELD, held - starts)


@cache
def rebuilt_steps(steps: int, held: float) -> int:
    """Return how many steps are taken forwards to have all of a stretch, from the last to the first.

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
