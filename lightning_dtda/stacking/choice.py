"""Whether to stack trainings: the ``stacked`` argument of ``record`` and ``retrain``."""

from __future__ import annotations

import logging
from typing import Literal, TypeAlias

from lightning_dtda.errors import ExecutionError
from lightning_dtda.execution import ThisProcess, Workers

_log = logging.getLogger(__name__)

Stacked: TypeAlias = bool | Literal["auto"]
"""Whether to run many trainings at once on one device; ``"auto"`` does so where possible."""


def chosen_stacked(stacked: Stacked, workers: Workers, compile: bool | None) -> Stacked:
    """Return the choice after checking that stacks are not combined with workers: ``"auto"`` is false with workers.

    Args:
        stacked: The choice.
        workers: Where the Trainer trains.
        compile: Whether to compile stacks, if it was said.

    Raises:
        ExecutionError: If the choice is unknown, stacks would have to be distributed, or there are none to compile.
    """
    if not isinstance(stacked, bool) and stacked != "auto":
        raise ExecutionError(f'stacked={stacked!r}; choose True, False or "auto".')
    if stacked == "auto" and not isinstance(workers, ThisProcess):
        _log.info("Training on workers, one by one. To stack trainings in this process, leave out workers.")
        stacked = False
    if compile is not None and stacked is False:
        raise ExecutionError(
            f"compile={compile} is for stacked trainings, but trainings are run one by one. Set stacked=True without "
            "workers, or leave out compile."
        )
    if stacked is True and not isinstance(workers, ThisProcess):
        raise ExecutionError(
            f"workers={workers} cannot be combined with stacked=True: stacked trainings run together in this process. "
            "Leave out workers or stacked."
        )
    return stacked
