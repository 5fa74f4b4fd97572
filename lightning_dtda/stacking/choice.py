"""Whether trainings are stacked: what ``record`` and ``retrain`` call ``stacked``."""

from __future__ import annotations

from typing import Literal, TypeAlias

from lightning_dtda.errors import ExecutionError
from lightning_dtda.execution import ThisProcess, Workers

Stacked: TypeAlias = bool | Literal["auto"]
"""Whether many trainings are done at once on one device; ``"auto"`` does so where that can be."""


def check_stacked(stacked: Stacked, workers: Workers) -> None:
    """Refuse what is no choice, and stacks that are to be shared out.

    Args:
        stacked: The choice.
        workers: Where the Trainer trains.

    Raises:
        ExecutionError: Naming what to give.
    """
    if stacked not in (True, False, "auto"):
        raise ExecutionError(f'stacked={stacked!r}; choose True, False or "auto".')
    if stacked is True and not isinstance(workers, ThisProcess):
        raise ExecutionError(
            f"workers={workers} are for trainings one by one; those of a stack are done together, in this process. "
            "Leave out workers or stacked."
        )
