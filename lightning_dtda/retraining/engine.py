"""Training engines: one interface for the Trainer, for stacked trainings, and for replayed ones."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_dtda.replay import Draws, Eager, Examples, Measurement
from lightning_dtda.replay.measuring import measure
from lightning_dtda.replay.stand_ins import Time
from lightning_dtda.retraining.recipe import Recipe
from lightning_dtda.retraining.task import Task


@dataclass(frozen=True)
class Outcome:
    """The outcome of a training.

    Args:
        task: The training.
        measurements: Measurement m of each query ``(queries,)``; ``None`` if the training failed.
        failure: Reason of the failure.
    """

    task: Task
    measurements: Tensor | None
    failure: str | None = None

    @classmethod
    def of(cls, task: Task, measurements: Tensor) -> Outcome:
        """Return the outcome of a training that ended; a training that diverged has failed."""
        if bool(measurements.isfinite().all()):
            return cls(task, measurements)
        return cls(task, None, "the measurement is not finite: the training diverged")


@dataclass(frozen=True)
class Retraining:
    """What to train and measure.

    Args:
        recipe: Recipe that makes the trainings; ``None`` if recorded runs are reweighted.
        removed: Subsets that tasks refer to.
        data: Description of the data set by :meth:`Recipe.describe`.
        queries: Inputs to measure on.
        measurement: Measurement m.
        device: Device of stacked and reweighted trainings; ``None`` for that of the Trainer, or of the module.
        draws: Draws to average over if the measurement draws random numbers.
    """

    recipe: Recipe | None
    removed: tuple[tuple[int, ...], ...]
    data: dict[str, Any]
    queries: Examples
    measurement: Measurement
    device: torch.device | str | None = None
    draws: Draws = field(default_factory=Draws)

    def removed_in(self, task: Task) -> tuple[int, ...]:
        """Return the examples that are removed in a training."""
        return () if task.subset is None else self.removed[task.subset]

    def measure(self, eager: Eager, theta: Tensor, buffers: Mapping[str, Tensor], time: Time) -> Tensor:
        """Measure trained models ``(runs, queries)``; see :func:`~lightning_dtda.replay.measuring.measure`.

        Args:
            eager: Runner of the module.
            theta: Trained parameters ``(runs, P)``.
            buffers: Buffers and frozen parameters, each ``(runs, ...)``.
            time: Time at the end of the trainings.
        """
        return measure(eager, theta, buffers, self.queries, self.measurement, time, self.draws).cpu()


class Engine(ABC):
    """Runs trainings; every engine gives the same measurements, up to rounding."""

    name: ClassVar[str]
    """Name of the engine in the ground truth's ``about["engine"]``."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the engines that have trained: this one, or those that it leaves the work to."""
        return (self.name,)

    @abstractmethod
    def train(self, retraining: Retraining, tasks: Sequence[Task]) -> Iterator[list[Outcome]]:
        """Train, and yield outcomes as soon as trainings finish, in any order; each task once.

        Raises:
            RetrainingError: If the engine cannot run these trainings at all. A single failure is an outcome, not an
                error.
        """
