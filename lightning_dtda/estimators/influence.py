"""Influence functions: the response of a training that has come to an end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_dtda.errors import AttributionError
from lightning_dtda.estimators.curvatures.curvature import Curvature, Damping, check_damping, resolve_damping
from lightning_dtda.estimators.curvatures.gauss_newton import GaussNewton
from lightning_dtda.estimators.estimator import Advance, Estimate, Estimator, Plan, Question
from lightning_dtda.estimators.measuring import measure
from lightning_dtda.estimators.memory import kept_pages
from lightning_dtda.estimators.objective import Objective
from lightning_dtda.replay import Precision, Replay, shape_key
from lightning_dtda.trajectory import Run
from lightning_dtda.units import GIB, human_bytes

_TOGETHER = 8
"""Runs that share a copy of the module and of the data, and whose answers are stored together."""

_VECTORS = 8
"""Vectors of P numbers that each query needs at once: its gradient, and those of an iterative solution."""


class InfluenceFunctions(Estimator):
    r"""Responses at the end of training, by the inverse of a curvature matrix.

    .. math:: r_k = \frac1N \nabla m(\theta_T)^\top (H + \delta)^{-1} \nabla l_k(\theta_T)

    with H the Hessian of the mean training loss, or a matrix in its place. It is where unrolled differentiation comes
    to when a training goes on for long with small steps (Mlodozeniec et al., arXiv 2506.12965, theorem 2; Koh and
    Liang, arXiv 1703.04730, section 2): predicted changes of m when an example is removed, in m's unit. What the order
    of batches and the optimizer did on the way is not in it.

    Losses are those of the module in evaluation mode (no dropout, running statistics for BatchNorm), one example at a
    time. Of a run, its last checkpoint is needed only; the gradient of one of its steps is computed again and compared
    with the record, to make sure of module and data.

    Args:
        curvature: What stands for H, and its damping; :class:`~lightning_dtda.estimators.GaussNewton` if not given.
        precision: ``"recorded"``, or ``"float64"`` to compute in double.
        memory_budget: In GiB; examples and queries are worked on in chunks that stay below it.

    Raises:
        AttributionError: If an argument is out of range.
    """

    def __init__(
        self, curvature: Curvature | None = None, precision: Precision = "recorded", memory_budget: float = 1.0
    ) -> None:
        if precision not in ("recorded", "float64"):
            raise AttributionError(f'precision={precision!r}; choose "recorded" or "float64".')
        if memory_budget <= 0:
            raise AttributionError("memory_budget must be positive.")
        if curvature is not None and not isinstance(curvature, Curvature):
            raise AttributionError(f"curvature={curvature!r} is no Curvature. Give GaussNewton(), say.")
        self.curvature = GaussNewton() if curvature is None else curvature
        self.precision = precision
        self.memory_budget = memory_budget
        self._chunks: dict[tuple[str, int], int] = {}

    @override
    def settings(self) -> dict[str, Any]:
        return {
            "class": f"{type(self).__module__}.{type(self).__qualname__}",
            "curvature": self.curvature.settings(),
            "precision": self.precision,
        }

    @override
    def plan(self, runs: Sequence[Run], question: Question) -> Plan:
        self._chunks = {}
        budget = self.memory_budget * GIB
        objective = self._objective(self._replay(runs[:1], question), question)
        each = _VECTORS * objective.size * objective.theta.itemsize
        chunk = min(len(question.queries), int(budget / 2 / each))
        if chunk < 1:
            raise AttributionError(
                f"A query needs about {human_bytes(2 * each)} for {objective.size} parameters; memory_budget is "
                f"{self.memory_budget:g} GiB. Raise it."
            )
        batches = [
            tuple(alike[start : start + _TOGETHER])
            for _, group in groupby(sorted(runs, key=shape_key), key=shape_key)
            for alike in [list(group)]
            for start in range(0, len(alike), _TOGETHER)
        ]
        objective.slopes(objective.theta.new_ones(chunk, objective.size))  # finds the chunks' size, and warms up
        started = time.perf_counter()
        objective.slopes(objective.theta.new_ones(chunk, objective.size))
        seconds = (time.perf_counter() - started) * (1 + self.curvature.passes(objective))
        return Plan(
            batches=tuple(batches),
            queries_per_chunk=chunk,
            memory=int(budget),
            seconds=len(runs) * seconds * -(-len(question.queries) // chunk),
        )

    @override
    def estimate(self, runs: Sequence[Run], question: Question, plan: Plan, advance: Advance) -> Estimate:
        return self.estimate_dampings(runs, question, plan, advance, [self.curvature.damping])[0]

    def estimate_dampings(
        self, runs: Sequence[Run], question: Question, plan: Plan, advance: Advance, dampings: Sequence[Damping]
    ) -> list[Estimate]:
        """Answer the question for one of the plan's batches, with several dampings of one fitted curvature each.

        Args:
            runs: A batch.
            question: The question.
            plan: The plan.
            advance: Told how much is done.
            dampings: In place of the curvature's own.

        Returns:
            An estimate for each damping.
        """
        replay = self._replay(runs, question)
        with kept_pages(replay.device):
            answers = []
            for number, run in enumerate(runs):
                answers.append(self._answer(replay.alone(number), question, plan, dampings))
                advance(run.steps)
        baselines = torch.stack([baseline for baseline, _, _ in answers])
        drift = [drift for _, _, drift in answers]
        stacked = [torch.stack(responses) for responses in zip(*(found for _, found, _ in answers), strict=True)]
        return [Estimate(baselines, responses, drift) for responses in stacked]

    def _answer(
        self, replay: Replay, question: Question, plan: Plan, dampings: Sequence[Damping]
    ) -> tuple[Tensor, list[Tensor], Any]:
        """Return m ``(Q,)``, the responses ``(Q, K)`` for each damping, and the drift of one run."""
        replay.check_step(question.end(replay.steps) - 1)
        objective = self._objective(replay, question)
        fitted = self.curvature.fit(objective)
        given = [resolve_damping(check_damping(damping), self.curvature, fitted) for damping in dampings]
        queries = question.queries.to((replay.recorded_dtype, replay.dtype), replay.device)
        baselines: list[Tensor] = []
        responses: list[list[Tensor]] = [[] for _ in given]
        for chunk in torch.arange(len(queries)).split(plan.queries_per_chunk):
            values, gradients, _ = measure(replay, queries.fetch(chunk), question.measurement, question.step)
            baselines.append(values[0])
            for damping, found in zip(given, responses, strict=True):
                solution = fitted.solve(gradients[0], damping).vectors
                found.append(question.removals.total(objective.slopes(solution) / objective.examples))
        return torch.cat(baselines), [torch.cat(found) for found in responses], replay.drift[0]

    def _objective(self, replay: Replay, question: Question) -> Objective:
        return Objective(replay, question.step, memory=self.memory_budget * GIB / 2, chunks=self._chunks)

    def _replay(self, runs: Sequence[Run], question: Question) -> Replay:
        return Replay(runs, question.module, question.examples, precision=self.precision, device=question.device)
