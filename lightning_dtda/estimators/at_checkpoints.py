"""Base class of estimators that use only checkpoints of a run, one run at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_dtda.errors import AttributionError
from lightning_dtda.estimators.curvatures.curvature import Curvature
from lightning_dtda.estimators.estimator import Advance, Estimate, Estimator, Plan, Question, batches_of_equal_shape
from lightning_dtda.estimators.example_gradients import LARGEST_CHUNK, Chunk
from lightning_dtda.estimators.objective import Objective
from lightning_dtda.execution.memory import kept_pages
from lightning_dtda.replay import Precision, Replay
from lightning_dtda.trajectory import Run
from lightning_dtda.units import GIB, human_bytes, is_quantity

_TOGETHER = 8
"""Number of runs that share a copy of the module and the data, and whose answers are stored together."""

_SHARE = 0.4
"""Fraction of the memory for derivatives of the training objective. The rest is for the queries' vectors and for the
workspace of convolutions."""

_TIMED, _LONG_ENOUGH = 16, 0.05
"""Minimum number of examples, and minimum time in seconds, of a trial that predicts the time for all examples."""

_PLANNED = "objective of the plan"
"""Key in :attr:`Question.kept`."""

Answer = tuple[Tensor, Sequence[Tensor]]
"""For one run, m ``(Q,)`` and the responses ``(Q, K)``, in one version or several."""

Responder = Callable[[Tensor], Sequence[Tensor]]
"""Function from gradients of m ``(Q, P)`` to responses of all examples ``(Q, N)``, in one version or several."""


class CheckpointEstimator(Estimator):
    """An estimator that uses only checkpoints of a run.

    A subclass defines :meth:`responder`, lists its arguments in :attr:`arguments`, and estimates its cost with
    :attr:`vectors` and :attr:`passes_per_chunk` or :meth:`passes`.

    Args:
        precision: ``"recorded"``, or ``"float64"`` to compute in double precision.
        memory_budget: Memory budget in GiB; examples and queries are processed in chunks that fit in it.

    Raises:
        AttributionError: If an argument is out of range.
    """

    arguments: ClassVar[tuple[str, ...]] = ("precision",)
    """Names of the attributes that the responses depend on."""

    vectors: ClassVar[float] = 2
    """Number of vectors of length P held per query: its gradient, and one for the backward pass."""

    passes_per_chunk: ClassVar[float] = 1.0
    """Number of passes over the training examples for each chunk of queries, unless :meth:`passes` computes it."""

    def __init__(self, precision: Precision = "recorded", memory_budget: float = 1.0) -> None:
        if precision not in ("recorded", "float64"):
            raise AttributionError(f'precision={precision!r}; choose "recorded" or "float64".')
        if not (is_quantity(memory_budget) and memory_budget > 0):
            raise AttributionError(f"memory_budget={memory_budget!r} must be positive.")
        self.precision = precision
        self.memory_budget = memory_budget
        self._chunks: dict[str, Chunk] = {}
        self._kept: dict[Any, Any] = {}

    @override
    def settings(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in self.arguments}
        return {"class": f"{type(self).__module__}.{type(self).__qualname__}"} | {
            name: value.settings() if isinstance(value, Curvature) else value for name, value in values.items()
        }

    def at_once(self, examples: int) -> int:
        """Return how many of some examples the answers so far held at once, where they took most memory.

        Args:
            examples: Number of examples.
        """
        most = max(
            self._chunks.values(), key=lambda chunk: min(chunk.examples, examples) * chunk.per_example, default=None
        )
        return min(examples, LARGEST_CHUNK if most is None else most.examples)

    @property
    def has_traced(self) -> bool:
        """Whether the answers so far traced passes of single examples, and keep the traces."""
        return any(trace is not None for trace in self._kept.values())

    def passes(self, runs: Sequence[Run], question: Question, objective: Objective) -> float:
        """Estimate the number of passes over the training examples for each chunk of queries."""
        return self.passes_per_chunk

    def responder(self, replay: Replay, question: Question) -> Responder:
        r"""Return the estimator's formula for one run, a function of the queries' gradients.

        Args:
            replay: The run.
            question: The question.

        Returns:
            A function from gradients of m at the step in question ``(Q, P)`` to the responses of all examples
            ``(Q, N)``, in one version or several.
        """
        raise NotImplementedError(f"{type(self).__name__} must define responder() or answer().")

    def answer(self, replay: Replay, question: Question, plan: Plan) -> Answer:
        """Answer the question for one run with :meth:`responder`; override this to use several checkpoints."""
        return answer_in_chunks(replay, question, plan, self.responder(replay, question))

    @override
    def plan(self, runs: Sequence[Run], question: Question) -> Plan:
        self._chunks.clear()
        self._kept.clear()
        question.kept.pop(_PLANNED, None)
        budget = self.memory_budget * GIB
        objective = self.objective(question.replay(runs[:1], self.precision), question, question.step)
        passes = self.passes(runs, question, objective)
        each = self.vectors * objective.size * objective.theta.itemsize
        chunk = min(len(question.queries), int(budget / 2 / each))
        if chunk < 1:
            raise AttributionError(
                f"A query needs about {human_bytes(2 * each)} for {objective.size} parameters; memory_budget is "
                f"{self.memory_budget:g} GiB. Raise it."
            )
        vectors = objective.theta.new_ones(chunk, objective.size)
        seconds = _seconds_of_slopes(objective, vectors) * passes
        question.kept[_PLANNED] = self, objective
        return Plan(
            batches=batches_of_equal_shape(runs, _TOGETHER),
            queries_per_chunk=chunk,
            memory=int(budget),
            is_bound=True,
            seconds=len(runs) * seconds * -(-len(question.queries) // chunk),
        )

    @override
    def estimate(self, runs: Sequence[Run], question: Question, plan: Plan, advance: Advance) -> Estimate:
        return self.estimates(runs, question, advance, lambda replay: self.answer(replay, question, plan))[0]

    def estimates(
        self, runs: Sequence[Run], question: Question, advance: Advance, answer: Callable[[Replay], Answer]
    ) -> list[Estimate]:
        """Answer run by run, and return an estimate for each version of the responses.

        Raises:
            AttributionError: If a run's responses are not finite.
        """
        replay = question.replay(runs, self.precision)
        answers, drift = [], []
        for number, run in enumerate(runs):
            alone = replay.alone(number)
            with kept_pages(alone.device):
                answers.append(answer(alone))
            if not all(bool(torch.isfinite(responses).all()) for responses in answers[-1][1]):
                raise AttributionError(
                    f"The responses of {run.path} are not finite: they overflowed. If the estimator has a "
                    'damping, increase it; or use precision="float64", or leave the run out.'
                )
            drift.append(alone.drift[0])
            advance(run.steps)
        baselines = torch.stack([baseline for baseline, _ in answers])
        versions = zip(*(responses for _, responses in answers), strict=True)
        return [Estimate(baselines, torch.stack(responses), drift) for responses in versions]

    def objective(
        self,
        replay: Replay,
        question: Question,
        step: int | None,
        share: float = _SHARE,
        scale: Tensor | None = None,
        decay: Tensor | None = None,
    ) -> Objective:
        """Return the training objective of a run at a step, with a fraction of the memory for its computations."""
        memory, draws = self.memory_budget * GIB * share, question.draws
        # the first answer reuses the objective of the plan, which then gives it up
        owner, planned = question.kept.pop(_PLANNED, (None, None))
        if owner is self and scale is None and decay is None and planned.is_of(replay, step, memory):
            return planned
        return Objective(
            replay, step, memory=memory, chunks=self._chunks, scale=scale, decay=decay, draws=draws, kept=self._kept
        )

    def checked_objective(self, replay: Replay, question: Question, share: float = _SHARE) -> Objective:
        """Return the training objective at the step in question, after comparing the step before it with the record."""
        objective = self.objective(replay, question, question.step, share)
        replay.check_step(objective.step - 1)
        return objective

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_chunks": {}, "_kept": {}}  # valid in this process only


def answer_in_chunks(replay: Replay, question: Question, plan: Plan, respond: Responder) -> Answer:
    """Measure one run's queries at the step in question, and respond to their gradients, chunk by chunk.

    Args:
        replay: The run.
        question: The question.
        plan: The plan for the question.
        respond: Function from gradients to responses, see :meth:`CheckpointEstimator.responder`.
    """
    baselines, responses = [], []
    for chunk in torch.arange(len(question.queries)).split(plan.queries_per_chunk):
        values, gradients, _ = question.measure_with_gradients(replay, chunk.tolist())
        baselines.append(values[0])
        responses.append([question.removals.total(found) for found in respond(gradients[0])])
    return torch.cat(baselines), [torch.cat(version) for version in zip(*responses, strict=True)]


def _seconds_of_slopes(objective: Objective, vectors: Tensor) -> float:
    """Estimate how long the slopes of all examples take, from as few examples as possible."""
    objective.slopes(vectors, torch.arange(min(2, objective.examples))).sum().item()  # finds the size of chunks
    count = min(_TIMED, objective.examples)
    while True:
        started = time.perf_counter()
        objective.slopes(vectors, torch.arange(count)).sum().item()  # waits for the device
        seconds = time.perf_counter() - started
        if seconds >= _LONG_ENOUGH or count == objective.examples:
            return seconds * objective.examples / count
        count = min(4 * count, objective.examples)
