"""Choice of the seeds to train: new seeds, or those of recorded runs."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Collection, Sequence
from itertools import count, islice
from pathlib import Path

from lightning_dtda.errors import RetrainingError

FIRST_SEED = 10_000
"""First of the new seeds: recordings count from 0, and ground truth and estimate must not share their noise."""


def fresh_seeds(argument: str, seeds: int | Sequence[int], recorded: Collection[int | None] = ()) -> tuple[int, ...]:
    """Return seeds that were not recorded; warn if given seeds were recorded.

    Args:
        argument: Name of the argument in errors.
        seeds: Number of seeds, or a list of seeds.
        recorded: Seeds of recorded runs.

    Raises:
        RetrainingError: If the seeds are invalid.

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
            "noise with estimates from those runs, and predictions look better than they are. Use other seeds.",
            stacklevel=4,
        )
    return chosen


def recorded_seeds(
    seeds: int | Sequence[int], recorded: Sequence[int], root: Path, independent: Sequence[int] | None = None
) -> tuple[int, ...]:
    """Return the seeds of some recorded runs.

    Args:
        seeds: Number of seeds, or a list of seeds.
        recorded: Seeds of all runs.
        root: Directory of the ensemble, for errors.
        independent: Seeds of runs that share no seed of a source, if others do: a number of seeds means these.

    Raises:
        RetrainingError: If there is no run with one of the seeds.
    """
    if isinstance(seeds, int) and independent is not None:
        if not 1 <= seeds <= len(independent):
            raise RetrainingError(
                f"seeds={seeds}, but only {len(independent)} runs in {root} share no seed of initialisation, order or "
                f"noise. Use 1 to {len(independent)}, or give a list of seeds."
            )
        return tuple(independent[:seeds])
    if isinstance(seeds, int):
        if not 1 <= seeds <= len(recorded):
            raise RetrainingError(f"seeds={seeds}, but {root} has {len(recorded)} runs. Use 1 to {len(recorded)}.")
        return tuple(recorded[:seeds])
    chosen = _checked("seeds", seeds, seeds)
    if missing := [seed for seed in chosen if seed not in recorded]:
        raise RetrainingError(f"{root} has no run with seed {missing[0]}; it has the seeds {list(recorded)}.")
    return chosen


def _checked(argument: str, given: object, seeds: Sequence[int]) -> tuple[int, ...]:
    try:
        chosen = tuple(operator.index(seed) for seed in seeds)
    except TypeError as error:
        raise RetrainingError(f"{argument}={given!r} must be a number of seeds, or a list of seeds.") from error
    if not chosen or len(set(chosen)) != len(chosen) or min(chosen) < 0:
        raise RetrainingError(f"{argument}={given!r} must give at least one seed, each only once and none negative.")
    return chosen
