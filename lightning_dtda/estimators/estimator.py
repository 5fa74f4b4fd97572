"""What every estimator is asked, and what it answers."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_dtda.estimators.removals import Removals
from lightning_dtda.replay import Draws, Drift, Examples, Measurement, Precision, Replay, shape_key
from lightning_dtda.trajectory import Run

Advance = Callable[[float], None]
"""Told, as work goes on, how many steps of runs were done since the last call (R steps for a step of R runs)."""


class _Kept(dict[Any, Replay]):
    """Replays that a process keeps; none of them goes with the question to another one."""

    def __reduce__(self) -> Any:
        return _Kept, ()


@dataclass(frozen=True)
class Question:
    """What is asked of each run: how does the measurement of each query change with each removal?

    Args:
        module: The user's module; only its architecture counts.
        examples: The N training examples.
        queries: The Q queries.
        measurement: m.
        device: Where to compute.
        removals: The K removals of training examples.
        step: The step t whose parameters are measured; ``None`` is the end of each run, t = T.
        draws: Of a measurement that draws random numbers.
    """

    module: LightningModule
    examples: Examples
    queries: Examples
    measurement: Measurement
    device: torch.device
    removals: Removals
    step: int | None = None
    draws: Draws = field(default_factory=Draws)
    _replays: _Kept = field(default_factory=lambda: _Kept(), compare=False, repr=False)

    def replay(self, runs: Sequence[Run], precision: Precision = "recorded", tolerance: float = 1e-3) -> Replay:
        """Return the replay of some runs; all of a precision share one copy of the module.

        Args:
            runs: Runs of equal shape.
            precision: As for :class:`~lightning_dtda.replay.Replay`.
            tolerance: As there.
        """
        kept = self._replays.get((precision, tolerance))
        if kept is not None:
            return kept.of(runs)
        replay = Replay(runs, self.module, self.examples, precision=precision, device=self.device, tolerance=tolerance)
        self._replays[precision, tolerance] = replay
        return replay

    def end(self, steps: int) -> int:
        """Return the step that is measured of a run of so many."""
        return steps if self.step is None else self.step


@dataclass(frozen=True)
class Plan:
    """How an estimator will go about it.

    Args:
        batches: The runs that are worked on together, in order.
        queries_per_chunk: Queries that are worked on together.
        memory: Peak memory in bytes.
        seconds: Time that all of it will take.
        removals_per_chunk: Removals that are worked on together, where an estimator works removal by removal.
        stacked: Whether runs and directions are computed at once, not one by one.
        compiled: Whether steps are compiled.
        held: How many steps of a run may be held in memory at once.
    """

    batches: tuple[tuple[Run, ...], ...]
    queries_per_chunk: int
    memory: int
    seconds: float
    removals_per_chunk: int | None = None
    stacked: bool = False
    compiled: bool = False
    held: float = math.inf


@dataclass(frozen=True)
class Diagnosis:
    """How well a run's responses can be computed, on a sample of its steps; see ``diagnose``.

    Args:
        finite_differences: Distance of the responses' derivative from a finite difference of retraining, both along one
            random direction of the weights, over the responses' norm. ``None`` where a replay in double precision
            leaves the record.
        precision: Distance of the responses in the recorded precision from those in double precision, over the latter's
            norm; ``None`` as above.
    """

    finite_differences: float | None
    precision: float | None


@dataclass(frozen=True)
class Estimate:
    """The answer for some runs.

    Args:
        baseline: m(theta_t) ``(runs, queries)``, t being the step that is asked about.
        responses: Predicted change of m with each removal ``(runs, queries, removals)``; of a group it is the
            sum over its examples, see :meth:`~lightning_dtda.estimators.Removals.total`.
        drift: How far each run's replay was from its record.
        adjoint_norms: For each run, by step, the norm of the adjoint over its norm at the step that is asked about (the
            median of the queries); none for estimators without one.
        diagnoses: How well each run's responses can be computed; none for estimators that do not differentiate runs.
    """

    baseline: Tensor
    responses: Tensor
    drift: Sequence[Drift]
    adjoint_norms: Sequence[dict[str, float]] = ()
    diagnoses: Sequence[Diagnosis] = ()


class Estimator(ABC):
    """Predicts the response of measurements to the removal of training examples.

    A new estimator is one class with these methods; the command line finds it by its import path.
    """

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Return the constructor's arguments in JSON: what must agree for a stored answer to be one to this."""

    @abstractmethod
    def plan(self, runs: Sequence[Run], question: Question) -> Plan:
        """Say how the runs will be batched, and what memory and time that takes.

        Raises:
            AttributionError: If it cannot be done within the estimator's memory budget.
        """

    @abstractmethod
    def estimate(self, runs: Sequence[Run], question: Question, plan: Plan, advance: Advance) -> Estimate:
        """Answer the question for one of the plan's batches."""


def batches_of_equal_shape(runs: Sequence[Run], size: int) -> tuple[tuple[Run, ...], ...]:
    """Split runs into batches of the same shape, each of at most the given size."""
    batches: list[tuple[Run, ...]] = []
    for _, group in groupby(sorted(runs, key=shape_key), key=shape_key):
        alike = tuple(group)
        batches += [alike[start : start + size] for start in range(0, len(alike), size)]
    return tuple(batches)
