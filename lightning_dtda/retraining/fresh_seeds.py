"""Which seeds are trained: fresh ones, or those of recorded runs."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Collection, Sequence
from itertools import count, islice
from pathlib import Path

from lightning_dtda.errors import RetrainingError

FIRST_SEED = 10_000
"""Where fresh seeds start: recordings count from 0, and truth and estimate are not to share their noise."""


def fresh_seeds(argument: str, seeds: int | Sequence[int], recorded: Collection[int | None] = ()) -> tuple[int, ...]:
    """Return seeds that were not recorded; of those that are given and were, a warning tells.

    Args:
        argument: What errors call it.
        seeds: A number of seeds, or which.
        recorded: Those of recorded runs.

    Raises:
        RetrainingError: If it is no set of seeds.

    Example:
        >>> fresh_seeds("seeds", 3, recorded=[0, 10_001])
        (10000, 10002, 10003)
    """
    if isinstance(seeds, int):
        unused = (seed for seed in count(FIRST_SEED) if seed not in recorded)
        return _checked(argument, seeds, tuple(islice(unused, max(seeds, 0))))
    chosen = _checked(argument, seeds, seeds)
    if shared := [seed for seed in chosen if seed in recorded]:
        warnings.warn(
            f"{argument} has {len(shared)} seeds that were recorded ({shared[0]} ...): the ground truth then shares "
            "noise with what is estimated from those runs, and looks better predicted than it is. Give others.",
            stacklevel=4,
        )
    return chosen


def recorded_seeds(seeds: int | Sequence[int], recorded: Sequence[int], root: Path) -> tuple[int, ...]:
    """Return the seeds of some recorded runs.

    Args:
        seeds: A number of them, or which.
        recorded: Those of all runs.
        root: What errors call the ensemble.

    Raises:
        RetrainingError: If there is no run with such a seed.
    """
    if isinstance(seeds, int):
        if not 1 <= seeds <= len(recorded):
            raise RetrainingError(f"seeds={seeds}; {root} has {len(recorded)} runs. Give 1 to {len(recorded)}.")
        return tuple(recorded[:seeds])
    chosen = _checked("seeds", seeds, seeds)
    if missing := [seed for seed in chosen if seed not in recorded]:
        raise RetrainingError(f"{root} has no run with seed {missing[0]}; it has {list(recorded)}.")
    return chosen


def _checked(argument: str, given: object, seeds: Sequence[int]) -> tuple[int, ...]:
    try:
        chosen = tuple(operator.index(seed) for seed in seeds)
    except TypeError as error:
        raise RetrainingError(f"{argument}={given!r}. Give a number of seeds, or a list of different ones.") from error
    if not chosen or len(set(chosen)) != len(chosen) or min(chosen) < 0:
        raise RetrainingError(f"{argument}={given!r} is no set of seeds. Give at least one, each once, from 0 on.")
    return chosen
