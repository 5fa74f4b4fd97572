"""TracIn: inner products of gradients, summed over the checkpoints of a run."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from typing_extensions import override

from lightning_dtda.errors import AttributionError
from lightning_dtda.estimators.at_checkpoints import Answer, CheckpointEstimator
from lightning_dtda.estimators.estimator import Plan, Question
from lightning_dtda.estimators.objective import Objective
from lightning_dtda.replay import Precision, Replay
from lightning_dtda.trajectory import Run


class TracIn(CheckpointEstimator):
    r"""Responses as the sum of the immediate effects of each use of an example, with gradients at checkpoints.

    .. math:: r_k = \sum_{i} \Big( \sum_{t = t_i}^{t_{i+1} - 1} \eta_t c_{t,k} \Big)
        \langle \nabla m(\theta_{t_i}), \nabla l_k(\theta_{t_i}) \rangle

    with the checkpoints :math:`t_i`, the learning rates :math:`\eta_t` of the steps between them, and the coefficients
    :math:`c_{t,k}` of the example's loss in those steps, zero if it was not in the batch. This is TracInCP (Pruthi et
    al., *Estimating Training Data Influence by Tracing Gradient Descent*, arXiv 2002.08484) with two differences. The
    paper uses one learning rate per checkpoint, as if every example were used once between two checkpoints; here each
    use counts with its own learning rate and coefficient, so a response has m's unit: the predicted change of m when
    the example is removed. The paper uses the checkpoint after the steps; here it is the one before them.

    For plain SGD, this is unrolled differentiation without curvature, with the gradient of m at each checkpoint instead
    of at the end. It ignores momentum, Adam's scaling and gradient clipping. Parameter groups have their own learning
    rates. Losses are computed in evaluation mode.

    Args:
        checkpoints: Number of recorded checkpoints to use, evenly spaced from the first; ``None`` for all of them. Each
            takes one pass over the training examples.
        precision: ``"recorded"``, or ``"float64"`` to compute in double precision.
        memory_budget: Memory budget in GiB; examples and queries are processed in chunks that fit in it.

    Raises:
        AttributionError: If an argument is out of range.
    """

    arguments = ("checkpoints", "precision")
    vectors = 3
    """Number of vectors of length P held per query: its gradient, a parameter group's part, and one for the product."""

    def __init__(
        self, checkpoints: int | None = None, precision: Precision = "recorded", memory_budget: float = 1.0
    ) -> None:
        if checkpoints is not None and (
            isinstance(checkpoints, bool) or not isinstance(checkpoints, int) or checkpoints < 1
        ):
            raise AttributionError(f"checkpoints={checkpoints!r}; give a positive number, or None for all of them.")
        super().__init__(precision, memory_budget)
        self.checkpoints = checkpoints

    @override
    def passes(self, runs: Sequence[Run], question: Question, objective: Objective) -> float:
        return sum(len(self._segments(run, question)) for run in runs) / len(runs)

    @override
    def answer(self, replay: Replay, question: Question, plan: Plan) -> Answer:
        chunks = torch.arange(len(question.queries)).split(plan.queries_per_chunk)
        baseline = torch.cat([question.measure_with_gradients(replay, chunk.tolist())[0][0] for chunk in chunks])
        responses = baseline.new_zeros(len(question.queries), len(question.removals))
        for first, last in self._segments(replay.runs[0], question):
            replay.check_step(first)
            objective = self.objective(replay, question, first)
            used = _used(replay, first, last)
            for chunk in chunks:
                _, gradients, _ = question.measure_with_gradients(replay, chunk.tolist(), first)
                for parts, weights in used:
                    vectors = torch.zeros_like(gradients[0])
                    for part in parts:
                        vectors[:, part] = gradients[0, :, part]
                    responses[chunk.to(responses.device)] += question.removals.total(
                        objective.slopes(vectors) * weights
                    )
        return baseline, [responses]

    def _segments(self, run: Run, question: Question) -> list[tuple[int, int]]:
        """Return the steps from each used checkpoint to the next one, as (first step, last step + 1)."""
        end = question.end(run.steps)
        starts = [step for step in run.checkpoint_steps if step < end]
        if self.checkpoints is not None:
            if self.checkpoints > len(starts):
                raise AttributionError(
                    f"checkpoints={self.checkpoints}; {run.path} has {len(starts)} before step {end}. Give at most "
                    f"{len(starts)}, or None for all of them; or record more with checkpoint_every."
                )
            starts = [starts[number * len(starts) // self.checkpoints] for number in range(self.checkpoints)]
        return list(pairwise([*starts, end]))


def _used(replay: Replay, first: int, last: int) -> list[tuple[list[slice], Tensor]]:
    """Return each example's sum of rates times coefficients ``(N,)``, for parameter groups with equal rates."""
    run = replay.runs[0]
    rates = torch.stack([run.learning_rates(step) for step in range(first, last)])  # (steps, groups)
    of_rates, owners = rates.unique(dim=1, return_inverse=True)
    weights = torch.zeros(of_rates.shape[1], len(replay.examples), dtype=rates.dtype)
    for step, rate in zip(range(first, last), of_rates, strict=True):
        weights.index_add_(1, run.batch_indices(step), rate[:, None] * run.coefficients(step))
    slices = replay.update.slices
    return [
        ([part for part, owner in zip(slices, owners.tolist(), strict=True) if owner == number], of_one)
        for number, of_one in enumerate(weights.to(replay.device, replay.dtype))
    ]
