"""Products of gradients: the simplest answers to what an example does to a measurement."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from lightning_dtda.estimators.at_checkpoints import CheckpointEstimator, Responder
from lightning_dtda.estimators.estimator import Question
from lightning_dtda.replay import Replay


class GradientDot(CheckpointEstimator):
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

    @override
    def responder(self, replay: Replay, question: Question) -> Responder:
        objective = self.measured_objective(replay, question)
        scale = 1 / objective.examples
        return lambda gradients: [objective.slopes(gradients) * scale]


class GradientCosine(CheckpointEstimator):
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

    passes_per_chunk = 2.0

    @override
    def responder(self, replay: Replay, question: Question) -> Responder:
        objective = self.measured_objective(replay, question)
        norms = objective.theta.new_empty(objective.examples)
        for indices, of_examples in objective.gradients(held=1):
            norms[indices] = of_examples.norm(dim=1)

        def respond(gradients: Tensor) -> list[Tensor]:
            directions = gradients * _reciprocal(gradients.norm(dim=1, keepdim=True))
            return [objective.slopes(directions) * _reciprocal(norms)]

        return respond


def _reciprocal(norms: Tensor) -> Tensor:
    """Return one over each norm, and zero for a norm of zero."""
    return torch.where(norms > 0, 1 / norms, 0)
