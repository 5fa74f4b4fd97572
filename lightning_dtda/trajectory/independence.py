"""Which runs of a crossed ensemble are independent: those that share the seed of no source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def independent_runs(seeds: Sequence[Mapping[Any, int] | None]) -> list[int]:
    """Return positions of runs of which no two share a seed, the first ones possible.

    Args:
        seeds: Seed of each source in each run; ``None`` or empty for runs with a single seed, which share none.

    Example:
        >>> independent_runs([{"order": 0, "noise": 0}, {"order": 0, "noise": 1}, {"order": 1, "noise": 1}, None])
        [0, 2, 3]
    """
    taken: set[tuple[str, int]] = set()
    chosen = []
    for position, of_run in enumerate(seeds):
        own = set((of_run or {}).items())
        if not own & taken:
            taken |= own
            chosen.append(position)
    return chosen
