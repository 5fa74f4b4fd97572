"""Products of gradients: the simplest estimators of how an example affects a measurement."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from lightning_dtda.estimators.at_checkpoints import CheckpointEstimator, Responder
from lightning_dtda.estimators.estimator import Question
from lightning_dtda.replay import Replay


class GradientDot(CheckpointEstimator):
    r"""Responses as the inner product of two gradients at the end of training.

    .. math:: r_k = \frac1N \langle \nabla m(\theta_T), \nabla l_k(\theta_T) \rangle

    This is the influence function with the identity as curvature, and has the same sign: the predicted change of m when
    the example is removed, up to a step size. Charpiat et al., *Input Similarity from the Neural Network Perspective*,
    arXiv 2102.05262, use the network's output for both m and l. Losses are computed in evaluation mode.

    Args:
        precision: ``"recorded"``, or ``"float64"`` to compute in double precision.
        memory_budget: Memory budget in GiB; examples and queries are processed in chunks that fit in it.

    Raises:
        AttributionError: If an argument is out of range.
    """

    @override
    def responder(self, replay: Replay, question: Question) -> Responder:
        objective = self.checked_objective(replay, question)
        scale = 1 / objective.examples
        return lambda gradients: [objective.slopes(gradients) * scale]


class GradientCosine(CheckpointEstimator):
    r"""The cosine of the angle between two gradients at the end of training.

    .. math:: r_k = \frac{\langle \nabla m(\theta_T), \nabla l_k(\theta_T) \rangle}
        {\lVert \nabla m(\theta_T) \rVert \, \lVert \nabla l_k(\theta_T) \rVert}

    Unlike :class:`GradientDot`, it does not rank examples with large gradients (outliers, wrong labels) first for every
    query. A positive response means that m grows when the example is removed, but the response has no unit: use it for
    rankings only. The response to a group is the sum of its examples' cosines. If a gradient is zero, the response is
    zero. Charpiat et al., *Input Similarity from the Neural Network Perspective*, arXiv 2102.05262, use the network's
    output for both m and l.

    Args:
        precision: ``"recorded"``, or ``"float64"`` to compute in double precision.
        memory_budget: Memory budget in GiB; examples and queries are processed in chunks that fit in it.

    Raises:
        AttributionError: If an argument is out of range.
    """

    passes_per_chunk = 2.0

    @override
    def responder(self, replay: Replay, question: Question) -> Responder:
        objective = self.checked_objective(replay, question)
        norms = objective.theta.new_empty(objective.examples)
        for indices, of_examples in objective.gradients(held=1):
            norms[indices] = of_examples.norm(dim=1)

        def respond(gradients: Tensor) -> list[Tensor]:
            directions = gradients * _reciprocal(gradients.norm(dim=1, keepdim=True))
            return [objective.slopes(directions) * _reciprocal(norms)]

        return respond


def _reciprocal(norms: Tensor) -> Tensor:
    """Return the reciprocal of each norm, and zero for a norm of zero."""
    return torch.where(norms > 0, 1 / norms, 0)
