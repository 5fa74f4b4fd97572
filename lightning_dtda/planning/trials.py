"""What an estimator takes, found by trying it on a few examples and queries."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from torch.utils.data import Subset

from lightning_dtda.attribution.resources import response_bytes
from lightning_dtda.errors import AttributionError
from lightning_dtda.estimators import KFAC, Estimator, GaussNewton, Plan, Question, Removals
from lightning_dtda.estimators.at_checkpoints import CheckpointEstimator
from lightning_dtda.execution.memory import peak_memory, resident_memory
from lightning_dtda.planning.forecast import Cost
from lightning_dtda.replay import Examples, Precision, Replay
from lightning_dtda.trajectory import Run
from lightning_dtda.trajectory.prolonged import ProlongedRun

_FEWEST_EXAMPLES, _QUERIES = 64, 8
"""Of the smallest trial, and the most queries of any."""

_GROWTH = 4
"""Each trial has so many times the examples of the one before."""

_LONG_ENOUGH = 0.5
"""Seconds of a trial after which no larger one is made: what a call costs whatever the examples is little of it."""

_CALLS = 4
"""Of a short trial, of which the fastest counts."""

_CHECKPOINTS = 2
"""Stretches between checkpoints in a trial, where an estimator passes the examples at each of them."""

_STEEPER = 1.05
"""The power of the number of examples above which something is not linear in it; less is what timings vary by."""

_SATURATED = 1024
"""Examples beyond which an estimator holds no more of them at once, where it holds what is linear in their number."""

_ANYTHING = 1e30
"""The tolerance of replays whose steps are no record of these examples."""


class TrialQuestion(Question):
    """A question to prolonged runs, whose replays need not agree with their record."""

    def replay(self, runs: Sequence[Run], precision: Precision = "recorded", tolerance: float = _ANYTHING) -> Replay:
        """Return the replay of some runs."""
        return super().replay(runs, precision, _ANYTHING)


def repeated(examples: Examples, count: int) -> Examples:
    """Return so many examples: the first ones, or all of them over and over."""
    if count == len(examples):
        return examples
    some = Subset(examples.dataset, [number % len(examples) for number in range(count)])
    return Examples(some, examples.collate_fn, datamodule=examples.datamodule, takes_lists=examples.takes_lists)


def cost_of(estimator: Estimator, runs: Sequence[ProlongedRun], question: Question) -> Cost:
    """Return what answering for some runs takes: as the estimator plans, and for one at checkpoints as it is tried.

    Raises:
        AttributionError: If it cannot be done within the estimator's memory budget.
    """
    started = time.perf_counter()
    plan = estimator.plan(runs, question)
    planning = time.perf_counter() - started
    disk = len(runs) * len(question.queries) * len(question.removals) * response_bytes(runs[0], estimator)
    if not isinstance(estimator, CheckpointEstimator):
        return Cost(planning + plan.seconds, resident_memory(plan.memory, question.device), disk)
    estimator = _for_trials(estimator, runs[0], question)
    run, share = _shortened(estimator, runs[0], question)
    tried = _tried(estimator, run, question, plan)
    memory = min(plan.memory, resident_memory(tried.memory, question.device))
    return Cost(planning + tried.at_first + len(runs) * tried.seconds / share, memory, disk)


def _shortened(estimator: CheckpointEstimator, run: ProlongedRun, question: Question) -> tuple[ProlongedRun, float]:
    """Return a run of fewer checkpoints where each takes a pass, and the share of the passes that it takes."""
    objective = estimator.objective(question.replay([run], estimator.precision), question, question.step)
    short = ProlongedRun(run, min(run.steps, _CHECKPOINTS * run.interval), run.interval, len(question.examples))
    try:
        passes = [estimator.passes([one], question, objective) for one in (short, run)]
    except AttributionError:  # it asks for more checkpoints than there are
        return run, 1.0
    return (short, passes[0] / passes[1]) if passes[0] < passes[1] else (run, 1.0)


def _for_trials(estimator: CheckpointEstimator, run: Run, question: Question) -> CheckpointEstimator:
    """Return a copy that writes to no cache, and goes about fewer examples as about all of them."""
    estimator = copy.deepcopy(estimator)
    curvature = getattr(estimator, "curvature", None)
    for part in (curvature, getattr(curvature, "preconditioner", None)):
        if isinstance(part, KFAC):
            part.cache = None
    if isinstance(curvature, GaussNewton) and curvature.solver == "auto":
        objective = estimator.objective(question.replay([run], estimator.precision), question, question.step)
        if objective.lacks_curvature is None:
            curvature.solver = "gram" if curvature.uses_gram(objective) else "cg"
    return estimator


class Tried(NamedTuple):
    """What answering for a run takes: seconds, bytes, and the seconds that the first run takes more than others."""

    seconds: float
    memory: float
    at_first: float


def _tried(estimator: CheckpointEstimator, run: ProlongedRun, question: Question, plan: Plan) -> Tried:
    """Return what a run takes, from trials on a few examples and queries."""
    examples, queries = len(question.examples), len(question.queries)
    few = min(queries, _QUERIES)

    def trial(examples: int, queries: int) -> _Trial:
        return _Trial(estimator, run, question, plan, examples, queries)

    many = min(examples, _FEWEST_EXAMPLES)
    while many < examples and trial(many, few).once() < _LONG_ENOUGH:
        many = min(examples, _GROWTH * many)
    *last, at_first = trial(many, few).costs()
    found = list(last)
    if queries > few:
        held = min(queries, plan.queries_per_chunk)
        for number, (one, wanted) in enumerate(zip(trial(many, 1).costs()[:2], (queries, held), strict=True)):
            found[number] += max(0.0, last[number] - one) / (few - 1) * (wanted - few)
    if many < examples:
        fewer = many // _GROWTH
        held = min(examples, max(_SATURATED, many))
        for number, (before, wanted) in enumerate(zip(trial(fewer, few).costs()[:2], (examples, held), strict=True)):
            found[number] *= _growth((fewer, before), (many, last[number]), examples, wanted)
    return Tried(found[0], found[1], at_first)


def _growth(before: tuple[int, float], last: tuple[int, float], examples: int, linear_up_to: int) -> float:
    """Return how many times its last value something comes to with all examples.

    Along a straight line through two values, no further than ``linear_up_to``; along a power of the number of examples
    where it grew faster than in proportion to it (a Gram matrix).

    Args:
        before: A number of examples and the value.
        last: A larger one.
        examples: N.
        linear_up_to: A number of examples.

    Example:
        >>> _growth((10, 2.0), (20, 4.0), 40, 40), _growth((10, 1.0), (20, 4.0), 40, 40)
        (2.0, 4.0)
    """
    (fewer, small), (many, large) = before, last
    small, large = max(small, 1e-9), max(large, 1e-9)
    power = math.log(large / small) / math.log(many / fewer)
    if power > _STEEPER:
        return (examples / many) ** power
    return 1 + max(0.0, 1 - small / large) / (many - fewer) * (linear_up_to - many)


class _Trial:
    """Answers for one run with the first examples and queries.

    Args:
        estimator: The estimator.
        run: The run.
        question: What will be asked.
        plan: The plan for that.
        examples: Number of examples.
        queries: Number of queries.
    """

    def __init__(
        self,
        estimator: CheckpointEstimator,
        run: ProlongedRun,
        question: Question,
        plan: Plan,
        examples: int,
        queries: int,
    ) -> None:
        asked = TrialQuestion(
            module=question.module,
            examples=repeated(question.examples, examples),
            queries=repeated(question.queries, queries),
            measurement=question.measurement,
            device=question.device,
            removals=Removals(examples),
            draws=question.draws,
        )
        some = ProlongedRun(run, run.steps, run.interval, examples)
        planned = replace(plan, batches=(), queries_per_chunk=min(queries, plan.queries_per_chunk))
        self._device = asked.device
        self._answer = lambda: estimator.estimate([some], asked, planned, lambda steps: None)
        estimator.plan([some], asked)  # forgets what was found of other trials

    def once(self) -> float:
        """Return the seconds of a call."""
        started = time.perf_counter()
        self._answer()
        return time.perf_counter() - started

    def costs(self) -> Tried:
        """Return what the fastest of a few calls takes, of which the first traces."""
        seconds = [self.once()]
        while sum(seconds) < _LONG_ENOUGH and len(seconds) < _CALLS:
            seconds.append(self.once())
        return Tried(min(seconds), peak_memory(self._answer, self._device), seconds[0] - min(seconds))
