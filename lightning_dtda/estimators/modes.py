"""Forward or reverse: in which direction a training is cheaper to differentiate."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from lightning_dtda.replay import Replay

_log = logging.getLogger(__name__)

Mode = Literal["auto", "reverse", "forward"]


@dataclass(frozen=True)
class Costs:
    """What a mode takes, and of what: queries in reverse, removals in forward mode.

    Args:
        mode: The mode.
        directions: Number of queries or of removals.
        per_run: Bytes that a run needs whatever their number.
        per_direction: Bytes that each of a chunk adds.
        time: Returns the seconds of a step, for a replay and a number of directions.
    """

    mode: Literal["reverse", "forward"]
    directions: int
    per_run: float
    per_direction: float
    time: Callable[[Replay, int], float]

    def fit(self, budget: float) -> bool:
        """Say whether one direction of one run fits a number of bytes."""
        return self.per_run + self.per_direction <= budget


def choose(
    mode: Mode,
    horizon: int | str | None,
    budget: float,
    queries: int,
    removals: int,
    reverse: Callable[[], Costs],
    forward: Callable[[], Costs],
) -> Costs:
    """Return the costs of the mode that is asked for; with ``"auto"``, of the one that takes fewer sweeps.

    A step costs about as much for a query in reverse as for a removal in forward mode, so that their numbers decide;
    but the reverse mode has to hold the steps between two checkpoints.

    Args:
        mode: As asked for.
        horizon: As asked for; ``"auto"`` is known to the reverse mode only.
        budget: Bytes.
        queries: Q.
        removals: K.
        reverse: Measures the costs of the reverse mode.
        forward: Measures those of the forward mode.
    """
    if mode != "auto":
        return reverse() if mode == "reverse" else forward()
    counts = f"{queries} queries against {removals} removals"
    if horizon == "auto" or queries <= removals:
        backwards = reverse()
        if horizon == "auto" or backwards.fit(budget):
            why = 'horizon="auto" needs adjoints' if horizon == "auto" else f"it pays for each query, {counts}"
            _log.info("Differentiating in reverse mode: %s.", why)
            return backwards
        forwards, why = forward(), "the steps between two checkpoints do not fit memory_budget"
    else:
        forwards, why = forward(), f"it pays for each removal, {counts}"
        backwards = forwards if forwards.fit(budget) else reverse()
    if not forwards.fit(budget):
        return backwards  # which is refused, unless it fits
    _log.info("Differentiating in forward mode: %s.", why)
    return forwards
