"""The interface of estimators: question, plan, estimate."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from inspect import signature
from itertools import chain, count, groupby
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_dtda.estimators.removals import Removals
from lightning_dtda.execution.memory import OBJECTS
from lightning_dtda.replay import Draws, Drift, Examples, Measurement, Precision, Replay, shape_key
from lightning_dtda.replay.measuring import measure_with_gradients
from lightning_dtda.trajectory import Run

Advance = Callable[[float], None]
"""Function called with the number of steps done since the last call; a step of R runs counts as R."""


class _Kept(dict[Any, Any]):
    """Objects cached in one process; a pickled question takes none of them along."""

    def __reduce__(self) -> Any:
        return _Kept, ()


@dataclass(frozen=True)
class Question:
    """The question for each run: how does the measurement of each query change with each removal?

    Args:
        module: The user's module; only its architecture is used, not its parameters.
        examples: The N training examples.
        queries: The Q queries.
        measurement: The measurement m.
        device: Device to compute on.
        removals: The K removals of training examples.
        step: Step t whose parameters are measured; ``None`` for the end of each run, t = T.
        draws: Random draws for measurements that use random numbers.
    """

    module: LightningModule
    examples: Examples
    queries: Examples
    measurement: Measurement
    device: torch.device
    removals: Removals
    step: int | None = None
    draws: Draws = field(default_factory=Draws)
    kept: _Kept = field(default_factory=lambda: _Kept(), compare=False, repr=False)
    """Replays, and what a plan leaves for the first answer."""

    def replay(self, runs: Sequence[Run], precision: Precision = "recorded", tolerance: float = 1e-3) -> Replay:
        """Return the replay of some runs; replays of the same precision share one copy of the module.

        Args:
            runs: Runs of equal shape.
            precision: See :class:`~lightning_dtda.replay.Replay`.
            tolerance: See :class:`~lightning_dtda.replay.Replay`.
        """
        kept: Replay | None = self.kept.get((precision, tolerance))
        if kept is not None:
            return kept.of(runs)
        replay = Replay(runs, self.module, self.examples, precision=precision, device=self.device, tolerance=tolerance)
        self.kept[precision, tolerance] = replay
        return replay

    def end(self, steps: int) -> int:
        """Return the step whose parameters are measured, for a run with the given number of steps."""
        return steps if self.step is None else self.step

    def measure_with_gradients(
        self,
        replay: Replay,
        numbers: Sequence[int],
        step: int | None = None,
        trained: tuple[Tensor, dict[str, Tensor]] | None = None,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        r"""Return :math:`m(\theta_t)` of stacked runs and its derivatives.

        Args:
            replay: The runs.
            numbers: Numbers of Q queries.
            step: Step t; that of the question if not given.
            trained: Parameters ``(runs, P)`` and buffers after step t; read from the record if not given.

        Returns:
            Values ``(runs, queries)``, gradients ``(runs, queries, P)``, and gradients with respect to running
            statistics, each ``(runs, queries, ...)``.

        Raises:
            AttributionError: If the measurement cannot be differentiated, or is not finite.
        """
        step = self.end(replay.steps) if step is None else step
        theta, buffers = replay.trained(step) if trained is None else trained
        end = "the end" if step == replay.steps else f"step {step}"
        return measure_with_gradients(
            replay.eager,
            theta,
            buffers,
            self.queries,
            numbers,
            self.measurement,
            [f"{end} of {run.path}" for run in replay.runs],
            replay.time(step),
            self.draws,
        )


@dataclass(frozen=True)
class Plan:
    """How an estimator will do the work.

    Args:
        batches: Batches of runs that are processed together, in order.
        queries_per_chunk: Number of queries that are processed together.
        memory: Peak memory of tensors in bytes.
        seconds: Estimated total time in seconds.
        removals_per_chunk: Number of removals that are processed together, if an estimator works removal by removal.
        stacked: Whether runs and directions are computed at once instead of one by one.
        compiled: Whether steps are compiled.
        held: Maximum number of steps of a run that are held in memory at once.
        is_bound: Whether ``memory`` is a budget that is kept to, rather than what is expected.
        objects: Bytes of what a process keeps besides tensors.
    """

    batches: tuple[tuple[Run, ...], ...]
    queries_per_chunk: int
    memory: int
    seconds: float
    removals_per_chunk: int | None = None
    stacked: bool = False
    compiled: bool = False
    held: float = math.inf
    is_bound: bool = False
    objects: int = OBJECTS


@dataclass(frozen=True)
class Diagnosis:
    """Accuracy of a run's responses, on a sample of its steps; see ``diagnose``.

    Args:
        finite_differences: Difference between the derivative and a finite difference of retraining, both along one
            random direction of the weights, relative to the norm of the responses. ``None`` if a replay in double
            precision deviates from the record.
        precision: Distance between the responses in recorded and in double precision, relative to the norm of the
            latter; ``None`` as above.
    """

    finite_differences: float | None
    precision: float | None


@dataclass(frozen=True)
class Estimate:
    """An estimator's answer for some runs.

    Args:
        baseline: Measured values m(theta_t) at the step t in question ``(runs, queries)``.
        responses: Predicted change of m for each removal ``(runs, queries, removals)``; for a group, the sum over its
            examples, see :meth:`~lightning_dtda.estimators.Removals.total`.
        drift: Deviation of each run's replay from its record.
        adjoint_norms: For each run, the norm of the adjoint by step, relative to its norm at the step in question
            (median over queries); empty for estimators without adjoints.
        diagnoses: Accuracy of each run's responses; empty for estimators that do not differentiate runs.
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
        """Return the arguments that the responses depend on, in JSON types; stored answers are reused if they agree."""

    @abstractmethod
    def plan(self, runs: Sequence[Run], question: Question) -> Plan:
        """Decide how runs are batched, and estimate memory and time.

        Raises:
            AttributionError: If the work does not fit in the estimator's memory budget.
        """

    @abstractmethod
    def estimate(self, runs: Sequence[Run], question: Question, plan: Plan, advance: Advance) -> Estimate:
        """Answer the question for one batch of the plan."""


def batches_of_equal_shape(runs: Sequence[Run], size: int) -> tuple[tuple[Run, ...], ...]:
    """Split runs into batches of equal shape, with at most ``size`` runs each."""
    batches: list[tuple[Run, ...]] = []
    for _, group in groupby(sorted(runs, key=shape_key), key=shape_key):
        alike = tuple(group)
        batches += [alike[start : start + size] for start in range(0, len(alike), size)]
    return tuple(batches)


def labels(estimators: Sequence[Estimator]) -> list[str]:
    """Return a name for each estimator: its class and the settings that are not the default ones.

    Example:
        >>> from lightning_dtda.estimators import EKFAC, InfluenceFunctions, UnrolledDifferentiation
        >>> labels([UnrolledDifferentiation(), UnrolledDifferentiation(horizon=None)])
        ['UnrolledDifferentiation', 'UnrolledDifferentiation(horizon=None)']
        >>> labels([InfluenceFunctions(EKFAC()), InfluenceFunctions(EKFAC(damping=0.1))])
        ['InfluenceFunctions(EKFAC)', 'InfluenceFunctions(EKFAC(damping=0.1))']
    """
    found: list[str] = []
    for name in map(_label, estimators):
        others = (f"{name} {number}" for number in count(2))
        found.append(next(one for one in chain([name], others) if one not in found))
    return found


def _label(described: Any) -> str:
    defaults = {name: parameter.default for name, parameter in signature(type(described)).parameters.items()}
    shown = [
        _label(getattr(described, name)) if isinstance(value, dict) else f"{name}={value}"
        for name, value in described.settings().items()
        if name in defaults and value != defaults[name]
    ]
    return type(described).__name__ + (f"({', '.join(shown)})" if shown else "")
