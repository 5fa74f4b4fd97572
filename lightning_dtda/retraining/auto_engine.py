"""An engine that stacks trainings if possible, and otherwise uses the Trainer."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

from typing_extensions import override

from lightning_dtda.errors import CannotStackError
from lightning_dtda.execution import Workers
from lightning_dtda.retraining.engine import Engine, Outcome, Retraining
from lightning_dtda.retraining.stacked_engine import StackedEngine
from lightning_dtda.retraining.task import Task
from lightning_dtda.retraining.trainer_engine import TrainerEngine

_log = logging.getLogger(__name__)

_FEWEST = 8
"""Minimum number of trainings to stack: the Trainer runs one or two of them anyway, and tracing takes a second."""


class AutoEngine(Engine):
    """Stacks trainings; if this is not possible, logs the reason and leaves the remaining ones to the Trainer.

    Args:
        workers: Where the Trainer trains.
        compile: Whether stacks are compiled.
    """

    def __init__(self, workers: Workers, compile: bool | None) -> None:
        self._trainer = TrainerEngine(workers)
        self._stacked = StackedEngine(compile)
        self._used: list[Engine] = []

    @property
    @override
    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(engine.name for engine in self._used))

    @override
    def train(self, retraining: Retraining, tasks: Sequence[Task]) -> Iterator[list[Outcome]]:
        remaining = list(tasks)
        if len(tasks) >= _FEWEST:
            try:
                for outcomes in self._stacked.train(retraining, tasks):
                    self._used.append(self._stacked)
                    for outcome in outcomes:
                        remaining.remove(outcome.task)
                    yield outcomes
            except CannotStackError as error:
                _log.info("Not stacked: %s. Training one by one with the Trainer.", error.reason)
        if remaining:
            self._used.append(self._trainer)
            yield from self._trainer.train(retraining, remaining)
