"""Whether to stack trainings: the ``stacked`` argument of ``record`` and ``retrain``."""

from __future__ import annotations

from typing import Literal, TypeAlias

from lightning_dtda.errors import ExecutionError
from lightning_dtda.execution import ThisProcess, Workers

Stacked: TypeAlias = bool | Literal["auto"]
"""Whether to run many trainings at once on one device; ``"auto"`` does so where possible."""


def check_stacked(stacked: Stacked, workers: Workers) -> None:
    """Check the choice, and that stacks are not combined with workers.

    Args:
        stacked: The choice.
        workers: Where the Trainer trains.

    Raises:
        ExecutionError: If the choice is unknown, or stacks would have to be distributed.
    """
    if stacked not in (True, False, "auto"):
        raise ExecutionError(f'stacked={stacked!r}; choose True, False or "auto".')
    if stacked is True and not isinstance(workers, ThisProcess):
        raise ExecutionError(
            f"workers={workers} cannot be combined with stacked=True: stacked trainings run together in this process. "
            "Leave out workers or stacked."
        )
