"""What trains: one protocol for the Trainer, for stacks, and for what is replayed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_dtda.replay import Draws, Eager, Examples, Measurement
from lightning_dtda.replay.measured import values
from lightning_dtda.replay.stand_ins import Time
from lightning_dtda.retraining.recipe import Recipe
from lightning_dtda.retraining.task import Task


@dataclass(frozen=True)
class Outcome:
    """What became of a training.

    Args:
        task: Which.
        measurements: m of each query ``(queries,)``; ``None`` where the training failed.
        failure: Why it did.
    """

    task: Task
    measurements: Tensor | None
    failure: str | None = None

    @classmethod
    def measured(cls, task: Task, measurements: Tensor) -> Outcome:
        """Return the outcome of a training that came to its end; it failed if it diverged."""
        if bool(measurements.isfinite().all()):
            return cls(task, measurements)
        return cls(task, None, "the measurement is not finite: the training diverged")


@dataclass(frozen=True)
class Retraining:
    """What is trained and measured.

    Args:
        recipe: Makes the trainings; ``None`` where recorded runs are trained over again.
        removed: The subsets that tasks refer to.
        data: What the data set is, as :meth:`Recipe.describe` says it.
        queries: What is measured on.
        measurement: m.
        device: Where stacked trainings are; ``None`` is the Trainer's own device.
        draws: Taken where the measurement draws random numbers.
    """

    recipe: Recipe | None
    removed: tuple[tuple[int, ...], ...]
    data: dict[str, Any]
    queries: Examples
    measurement: Measurement
    device: torch.device | str | None = None
    draws: Draws = field(default_factory=Draws)

    def removed_in(self, task: Task) -> tuple[int, ...]:
        """Return the examples that a training is without."""
        return () if task.subset is None else self.removed[task.subset]

    def measure(self, eager: Eager, theta: Tensor, buffers: Mapping[str, Tensor], time: Time) -> Tensor:
        """Measure trained models ``(runs, queries)``; see :func:`~lightning_dtda.replay.measured.values`.

        Args:
            eager: Runs the module.
            theta: Trained parameters ``(runs, P)``.
            buffers: Buffers and frozen parameters, each ``(runs, ...)``.
            time: Where the trainings ended.
        """
        return values(eager, theta, buffers, self.queries, self.measurement, time, self.draws).cpu()


class Engine(ABC):
    """Trains what is asked for; every engine gives the same measurements, up to rounding."""

    name: ClassVar[str]
    """What the ground truth's ``about["engine"]`` calls it."""

    @abstractmethod
    def train(self, retraining: Retraining, tasks: Sequence[Task]) -> Iterator[list[Outcome]]:
        """Train, and yield what is finished as soon as it is, in any order; each task once.

        Raises:
            RetrainingError: If the engine cannot do these trainings at all. One that fails is an outcome.
        """
