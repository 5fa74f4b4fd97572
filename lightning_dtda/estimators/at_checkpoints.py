"""What estimators share that look at checkpoints of a run only, one run after the other."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from lightning_dtda.errors import AttributionError
from lightning_dtda.estimators.estimator import Advance, Estimate, Plan, Question
from lightning_dtda.estimators.objective import Objective
from lightning_dtda.replay import Draws, Precision, Replay, shape_key
from lightning_dtda.trajectory import Run
from lightning_dtda.units import GIB, human_bytes

_TOGETHER = 8
"""Runs that share a copy of the module and of the data, and whose answers are stored together."""

_SHARE = 0.4
"""Share of the memory for the training objective's derivatives. The rest is for the queries' vectors, and for what
convolutions take on top of their tensors."""

Answer = Callable[[Replay], tuple[Tensor, Sequence[Tensor]]]
"""Returns of one run m ``(Q,)``, and the responses ``(Q, K)``, once or in several versions."""


@dataclass(frozen=True)
class AtCheckpoints:
    """Precision and memory, and what follows from them.

    Args:
        precision: ``"recorded"``, or ``"float64"`` to compute in double.
        memory_budget: In GiB; examples and queries are worked on in chunks that stay below it.

    Raises:
        AttributionError: If an argument is out of range.
    """

    precision: Precision
    memory_budget: float
    _chunks: dict[str, int] = field(default_factory=dict, repr=False)
    _kept: dict[Any, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.precision not in ("recorded", "float64"):
            raise AttributionError(f'precision={self.precision!r}; choose "recorded" or "float64".')
        if self.memory_budget <= 0:
            raise AttributionError("memory_budget must be positive.")

    def plan(
        self, runs: Sequence[Run], question: Question, vectors: float, passes: Callable[[Objective], float]
    ) -> Plan:
        """Batch runs and queries by memory, and time a pass over the training examples.

        Args:
            runs: The runs.
            question: The question.
            vectors: How many of P numbers each query needs at once.
            passes: How many passes a chunk of queries takes.

        Raises:
            AttributionError: If not even one query fits.
        """
        self._chunks.clear()
        self._kept.clear()
        budget = self.memory_budget * GIB
        objective = self.objective(self.replay(runs[:1], question), question.step, draws=question.draws)
        each = vectors * objective.size * objective.theta.itemsize
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
        vectors_of_chunk = objective.theta.new_ones(chunk, objective.size)
        objective.slopes(vectors_of_chunk).sum().item()  # finds the chunks' size, and warms up
        started = time.perf_counter()
        objective.slopes(vectors_of_chunk).sum().item()  # waits for the device
        seconds = (time.perf_counter() - started) * passes(objective)
        return Plan(
            batches=tuple(batches),
            queries_per_chunk=chunk,
            memory=int(budget),
            seconds=len(runs) * seconds * -(-len(question.queries) // chunk),
        )

    def estimates(self, runs: Sequence[Run], question: Question, advance: Advance, answer: Answer) -> list[Estimate]:
        """Ask for an answer run by run, and return an estimate for each version of the responses.

        Raises:
            AttributionError: If a run's responses are not finite.
        """
        replay = self.replay(runs, question)
        answers, drift = [], []
        for number, run in enumerate(runs):
            alone = replay.alone(number)
            answers.append(answer(alone))
            if not all(bool(torch.isfinite(responses).all()) for responses in answers[-1][1]):
                raise AttributionError(
                    f"The responses of {run.path} are not finite: they overflowed. Give a larger damping where there "
                    'is one, try precision="float64", or leave the run out.'
                )
            drift.append(alone.drift[0])
            advance(run.steps)
        baselines = torch.stack([baseline for baseline, _ in answers])
        versions = zip(*(responses for _, responses in answers), strict=True)
        return [Estimate(baselines, torch.stack(responses), drift) for responses in versions]

    def __getstate__(self) -> dict[str, Any]:
        # what is kept is of this process
        return {"precision": self.precision, "memory_budget": self.memory_budget, "_chunks": {}, "_kept": {}}

    def objective(
        self,
        replay: Replay,
        step: int | None,
        share: float = _SHARE,
        scale: Tensor | None = None,
        decay: Tensor | None = None,
        draws: Draws | None = None,
    ) -> Objective:
        """Return the training objective of a run at a step, whose work gets a share of the memory."""
        memory = self.memory_budget * GIB * share
        return Objective(
            replay, step, memory=memory, chunks=self._chunks, scale=scale, decay=decay, draws=draws, kept=self._kept
        )

    def replay(self, runs: Sequence[Run], question: Question) -> Replay:
        """Stack the runs."""
        return question.replay(runs, self.precision)
