"""The cost of an estimator, found by trying it on a few examples and queries."""

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
from lightning_dtda.estimators.curvatures.factors import combinations
from lightning_dtda.execution.memory import OBJECTS, TRACES, peak_memory, resident_memory
from lightning_dtda.planning.forecast import Cost
from lightning_dtda.replay import Examples, Precision, Replay
from lightning_dtda.trajectory import Run
from lightning_dtda.trajectory.prolonged import ProlongedRun

_FEWEST_EXAMPLES, _QUERIES = 64, 8
"""Number of examples in the smallest trial, and the largest number of queries in any trial."""

_GROWTH = 4
"""Ratio of the numbers of examples in successive trials."""

_LONG_ENOUGH = 0.5
"""Duration of a trial in seconds after which there is no larger one: the fixed cost of a call is then a small part."""

_CALLS = 4
"""Maximum number of calls in a short trial, of which the fastest counts."""

_CHECKPOINTS = 2
"""Number of intervals between checkpoints in a trial, if an estimator passes over the examples at each checkpoint."""

_STEEPER = 1.05
"""Exponent of the number of examples above which growth is not considered linear; timings vary by less than this."""

_ANYTHING = 1e30
"""Tolerance of replays whose steps need not agree with the record, because the examples are different."""


class TrialQuestion(Question):
    """A question about prolonged runs, whose replays need not agree with their record."""

    def replay(self, runs: Sequence[Run], precision: Precision = "recorded", tolerance: float = _ANYTHING) -> Replay:
        """Return a replay of some runs that accepts any difference from the record."""
        return super().replay(runs, precision, _ANYTHING)


def repeated(examples: Examples, count: int) -> Examples:
    """Return the given number of examples: the first ones, or all of them repeatedly."""
    if count == len(examples):
        return examples
    some = Subset(examples.dataset, [number % len(examples) for number in range(count)])
    return Examples(some, examples.collate_fn, datamodule=examples.datamodule, takes_lists=examples.takes_lists)


def cost_of(estimator: Estimator, runs: Sequence[ProlongedRun], question: Question) -> Cost:
    """Return the cost of an estimator for some runs: as planned, or from trials if the estimator uses checkpoints.

    Raises:
        AttributionError: If it does not fit in the estimator's memory budget.
    """
    started = time.perf_counter()
    plan = estimator.plan(runs, question)
    planning = time.perf_counter() - started
    disk = len(runs) * len(question.queries) * len(question.removals) * response_bytes(runs[0], estimator)
    if not isinstance(estimator, CheckpointEstimator):
        return Cost(planning + plan.seconds, resident_memory(plan.memory, question.device, plan.objects), disk)
    estimator = _for_trials(estimator, runs[0], question)
    run, share = _shortened(estimator, runs[0], question)
    tried = _tried(estimator, run, question, plan)
    objects = OBJECTS + (TRACES if estimator.has_traced else 0)
    memory = min(plan.memory, resident_memory(tried.memory, question.device, objects))
    return Cost(planning + tried.at_first + len(runs) * tried.seconds / share, memory, disk)


def _shortened(estimator: CheckpointEstimator, run: ProlongedRun, question: Question) -> tuple[ProlongedRun, float]:
    """Return a run with fewer checkpoints if each needs a pass over the data, and its fraction of the passes."""
    objective = estimator.objective(question.replay([run], estimator.precision), question, question.step)
    short = ProlongedRun(run, min(run.steps, _CHECKPOINTS * run.interval), run.interval, len(question.examples))
    try:
        passes = [estimator.passes([one], question, objective) for one in (short, run)]
    except AttributionError:  # it needs more checkpoints than the short run has
        return run, 1.0
    return (short, passes[0] / passes[1]) if passes[0] < passes[1] else (run, 1.0)


def _for_trials(estimator: CheckpointEstimator, run: Run, question: Question) -> CheckpointEstimator:
    """Return a copy that writes to no cache, and goes about few examples as about all of them."""
    estimator = copy.deepcopy(estimator)
    curvature = getattr(estimator, "curvature", None)
    for part in (curvature, getattr(curvature, "preconditioner", None)):
        if isinstance(part, KFAC):
            part.cache = None
            part.samples = combinations(part.samples, len(question.examples))
    if isinstance(curvature, GaussNewton) and curvature.solver == "auto":
        objective = estimator.objective(question.replay([run], estimator.precision), question, question.step)
        if objective.lacks_curvature is None:
            curvature.solver = "gram" if curvature.uses_gram(objective) else "cg"
    return estimator


class Tried(NamedTuple):
    """Cost of one run: seconds, bytes, and the additional seconds of the first run."""

    seconds: float
    memory: float
    at_first: float


def _tried(estimator: CheckpointEstimator, run: ProlongedRun, question: Question, plan: Plan) -> Tried:
    """Return the cost of a run, from trials on a few examples and queries."""
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
        held = max(many, estimator.at_once(examples))
        for number, (before, wanted) in enumerate(zip(trial(fewer, few).costs()[:2], (examples, held), strict=True)):
            found[number] *= _growth((fewer, before), (many, last[number]), examples, wanted)
    return Tried(found[0], found[1], at_first)


def _growth(before: tuple[int, float], last: tuple[int, float], examples: int, linear_up_to: int) -> float:
    """Return the ratio of a value with all examples to the value in the last trial.

    The value is extrapolated along a straight line through two trials, up to ``linear_up_to`` examples; or with a power
    of the number of examples if it grows faster than linearly (a Gram matrix).

    Args:
        before: Number of examples and value in the trial before the last one.
        last: Number of examples and value in the last trial.
        examples: N, the number of all examples.
        linear_up_to: Number of examples where linear growth ends.

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
    """A trial of an estimator on one run with the first examples and queries.

    Args:
        estimator: The estimator.
        run: The run.
        question: The full question.
        plan: Plan for the full question.
        examples: Number of examples in the trial.
        queries: Number of queries in the trial.
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
        estimator.plan([some], asked)  # resets the results of other trials

    def once(self) -> float:
        """Return the duration of a call in seconds."""
        started = time.perf_counter()
        self._answer()
        return time.perf_counter() - started

    def costs(self) -> Tried:
        """Return the cost of the fastest of a few calls; the first one also traces."""
        seconds = [self.once()]
        while sum(seconds) < _LONG_ENOUGH and len(seconds) < _CALLS:
            seconds.append(self.once())
        return Tried(min(seconds), peak_memory(self._answer, self._device), seconds[0] - min(seconds))
