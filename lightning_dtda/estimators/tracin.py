"""TracIn: products of gradients, summed over the checkpoints of a run."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from typing_extensions import override

from lightning_dtda.errors import AttributionError
from lightning_dtda.estimators.at_checkpoints import Answer, CheckpointEstimator
from lightning_dtda.estimators.estimator import Plan, Question
from lightning_dtda.estimators.measuring import measure
from lightning_dtda.estimators.objective import Objective
from lightning_dtda.replay import Precision, Replay
from lightning_dtda.trajectory import Run


class TracIn(CheckpointEstimator):
    r"""Responses by what each use of an example changed at once, with the gradients of recorded checkpoints.

    .. math:: r_k = \sum_{i} \Big( \sum_{t = t_i}^{t_{i+1} - 1} \eta_t c_{t,k} \Big)
        \langle \nabla m(\theta_{t_i}), \nabla l_k(\theta_{t_i}) \rangle

    with the checkpoints :math:`t_i` and, of the steps between two of them, the learning rates :math:`\eta_t` and the
    coefficients :math:`c_{t,k}` that the example's loss had, zero where it was not in the batch. This is TracInCP
    (Pruthi et al., *Estimating Training Data Influence by Tracing Gradient Descent*, arXiv 2002.08484).
    There each checkpoint counts with one learning rate, as if every example were used once between two checkpoints;
    here each use counts with its own rate and coefficient, so that a response has m's unit: predicted change of m when
    the example is removed. There the checkpoint after the steps is taken, here the one before them.

    For plain SGD it is unrolled differentiation without curvature, with m's gradient at each checkpoint in place of the
    one at the end. It knows nothing of momentum, of the scaling of Adam, or of clipping. Parameter groups have their
    own learning rates. Losses are those of the module in evaluation mode.

    Args:
        checkpoints: How many of the recorded checkpoints are taken, evenly spaced from the first; ``None`` is all of
            them. Each takes a pass over the training examples.
        precision: ``"recorded"``, or ``"float64"`` to compute in double.
        memory_budget: In GiB; examples and queries are worked on in chunks that stay below it.

    Raises:
        AttributionError: If an argument is out of range.
    """

    arguments = ("checkpoints", "precision")
    vectors = 3
    """Vectors of P numbers that each query needs at once: its gradient, a group's part, and forward mode's own."""

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
        baseline = torch.cat([measure(replay, question, chunk.tolist(), question.step)[0][0] for chunk in chunks])
        responses = baseline.new_zeros(len(question.queries), len(question.removals))
        for first, last in self._segments(replay.runs[0], question):
            replay.check_step(first)
            objective = self.objective(replay, question, first)
            used = _used(replay, first, last)
            for chunk in chunks:
                _, gradients, _ = measure(replay, question, chunk.tolist(), first)
                for parts, weights in used:
                    vectors = torch.zeros_like(gradients[0])
                    for part in parts:
                        vectors[:, part] = gradients[0, :, part]
                    responses[chunk.to(responses.device)] += question.removals.total(
                        objective.slopes(vectors) * weights
                    )
        return baseline, [responses]

    def _segments(self, run: Run, question: Question) -> list[tuple[int, int]]:
        """Return the stretches from a checkpoint that is taken to the next one, as (first step, last step + 1)."""
        end = question.end(run.steps)
        starts = [step for step in run.checkpoint_steps if step < end]
        if self.checkpoints is not None:
            if self.checkpoints > len(starts):
                raise AttributionError(
                    f"checkpoints={self.checkpoints}; {run.path} has {len(starts)} before step {end}. Give at most so "
                    "many, or None for all of them; checkpoint_every of the recorder makes more."
                )
            starts = [starts[number * len(starts) // self.checkpoints] for number in range(self.checkpoints)]
        return list(pairwise([*starts, end]))


def _used(replay: Replay, first: int, last: int) -> list[tuple[list[slice], Tensor]]:
    """Return the sum of rates times coefficients for each example ``(N,)``, by the parameter groups that share it."""
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
