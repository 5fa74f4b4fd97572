"""Products of gradients: the simplest answers to what an example does to a measurement."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_dtda.estimators.at_checkpoints import AtCheckpoints
from lightning_dtda.estimators.estimator import Advance, Estimate, Estimator, Plan, Question
from lightning_dtda.estimators.measuring import measure
from lightning_dtda.estimators.objective import Objective
from lightning_dtda.replay import Precision, Replay
from lightning_dtda.trajectory import Run

_VECTORS = 2
"""Vectors of P numbers that each query needs at once: its gradient, and what forward mode keeps beside it."""


class _GradientProduct(Estimator):
    """What both have in common: two gradients of one run at a time."""

    passes: ClassVar[float]
    """How often the gradients of all examples are computed."""

    def __init__(self, precision: Precision = "recorded", memory_budget: float = 1.0) -> None:
        self._work = AtCheckpoints(precision, memory_budget)
        self.precision = precision
        self.memory_budget = memory_budget

    @override
    def settings(self) -> dict[str, Any]:
        return {"class": f"{type(self).__module__}.{type(self).__qualname__}", "precision": self.precision}

    @override
    def plan(self, runs: Sequence[Run], question: Question) -> Plan:
        return self._work.plan(runs, question, _VECTORS, lambda _: self.passes)

    @override
    def estimate(self, runs: Sequence[Run], question: Question, plan: Plan, advance: Advance) -> Estimate:
        def answer(replay: Replay) -> tuple[Tensor, list[Tensor]]:
            return self._answer(
                replay, self._work.objective(replay, question.step, draws=question.draws), question, plan
            )

        return self._work.estimates(runs, question, advance, answer)[0]

    @abstractmethod
    def _answer(
        self, replay: Replay, objective: Objective, question: Question, plan: Plan
    ) -> tuple[Tensor, list[Tensor]]:
        """Return of one run m ``(Q,)``, and the responses ``(Q, K)``."""


class GradientDot(_GradientProduct):
    r"""Responses by the product of two gradients at the end of training.

    .. math:: r_k = \frac1N \langle \nabla m(\theta_T), \nabla l_k(\theta_T) \rangle

    (Charpiat et al., *Input Similarity from the Neural Network Perspective*, arXiv 2102.05262, have the network's
    output in place of both m and l.) It is the influence function with the identity for a curvature, and has
    its sign: predicted change of m when the example is removed, but for the length of a step. Losses are those of the
    module in evaluation mode.

    Args:
        precision: ``"recorded"``, or ``"float64"`` to compute in double.
        memory_budget: In GiB; examples and queries are worked on in chunks that stay below it.

    Raises:
        AttributionError: If an argument is out of range.
    """

    passes: ClassVar[float] = 1.0

    @override
    def _answer(
        self, replay: Replay, objective: Objective, question: Question, plan: Plan
    ) -> tuple[Tensor, list[Tensor]]:
        return _products(replay, objective, question, plan, 1 / objective.examples)


class GradientCosine(_GradientProduct):
    r"""The cosine of the angle between two gradients at the end of training.

    .. math:: r_k = \frac{\langle \nabla m(\theta_T), \nabla l_k(\theta_T) \rangle}
        {\lVert \nabla m(\theta_T) \rVert \, \lVert \nabla l_k(\theta_T) \rVert}

    (Charpiat et al., *Input Similarity from the Neural Network Perspective*, arXiv 2102.05262, have the network's
    output in place of both m and l.) Examples with large gradients, outliers and mislabelled ones, do not
    come first for every query. A positive response means that m grows when the example is removed, as for
    :class:`GradientDot`, but it has no unit: it is good for rankings only. A group's is the sum of its examples'
    cosines. Where a gradient is zero, so is the response.

    Args:
        precision: ``"recorded"``, or ``"float64"`` to compute in double.
        memory_budget: In GiB; examples and queries are worked on in chunks that stay below it.

    Raises:
        AttributionError: If an argument is out of range.
    """

    passes: ClassVar[float] = 2.0

    @override
    def _answer(
        self, replay: Replay, objective: Objective, question: Question, plan: Plan
    ) -> tuple[Tensor, list[Tensor]]:
        norms = torch.cat([gradients.norm(dim=1) for _, gradients in objective.gradients(held=1)])
        return _products(replay, objective, question, plan, _reciprocal(norms), normalize=True)


def _products(
    replay: Replay,
    objective: Objective,
    question: Question,
    plan: Plan,
    scale: Tensor | float,
    normalize: bool = False,
) -> tuple[Tensor, list[Tensor]]:
    """Return m ``(Q,)``, and the scaled products of its gradients, or of their directions, with the losses'."""
    replay.check_step(objective.step - 1)
    baselines, responses = [], []
    for chunk in torch.arange(len(question.queries)).split(plan.queries_per_chunk):
        values, gradients, _ = measure(replay, question, chunk.tolist(), question.step)
        vectors = gradients[0]
        if normalize:
            vectors = vectors * _reciprocal(vectors.norm(dim=1, keepdim=True))
        baselines.append(values[0])
        responses.append(question.removals.total(objective.slopes(vectors) * scale))
    return torch.cat(baselines), [torch.cat(responses)]


def _reciprocal(norms: Tensor) -> Tensor:
    """Return one over each norm, and zero for a norm of zero."""
    return torch.where(norms > 0, 1 / norms, 0)
