"""TRAK: responses of a model that is linear in randomly projected gradients of its outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from typing_extensions import override

from lightning_dtda.errors import AttributionError
from lightning_dtda.estimators.at_checkpoints import CheckpointEstimator, Responder
from lightning_dtda.estimators.curvatures.curvature import Damping, check_damping
from lightning_dtda.estimators.curvatures.exact_hessian import DenseSpectrum
from lightning_dtda.estimators.estimator import Plan, Question
from lightning_dtda.estimators.objective import Objective
from lightning_dtda.estimators.projection import Projection, check_dimension, projection_to
from lightning_dtda.replay import Precision, Replay
from lightning_dtda.replay.measurements import loss
from lightning_dtda.trajectory import Run
from lightning_dtda.units import GIB, human_bytes

_MATRICES = 4
"""Number of k x k matrices held at once: the kernel, its factor or eigenvectors, and the workspace for these."""

_GRADIENTS = 0.25
"""Fraction of the memory for gradients of losses; those of outputs take the same, and features the rest."""


class TRAK(CheckpointEstimator):
    r"""Responses of a kernel machine whose features are gradients of the model's output, randomly projected.

    .. math:: r_k = \frac1N \phi_q^\top \left(\frac1N \Phi^\top \Phi + \delta\right)^{-1} \phi_k
        \frac{\partial l_k}{\partial f}, \qquad \phi = S^\top \nabla f(\theta_T)

    where the measurement is the output f, computed for the queries and for the training examples (the rows of
    :math:`\Phi`): ``"margin"`` for classification, ``"prediction"`` for regression (Park et al., *TRAK: Attributing
    Model Behavior at Scale*, arXiv 2303.14186). As in the paper, the second derivative of the loss is left out:
    responses have the sign of predicted changes of m when the example is removed, but not their scale.

    The derivative of the loss by f comes from two gradients,

    .. math:: \frac{\partial l_k}{\partial f} =
        \frac{\langle \nabla l_k, \nabla f_k \rangle}{\langle \nabla f_k, \nabla f_k \rangle},

    which is exact if the loss depends on the parameters only through f, as cross entropy does through the margin (where
    it is the paper's :math:`-(1 - p_k)`), and otherwise a projection.

    Each run has its own responses, so the mean influence is a mean of products over runs. The paper averages
    :math:`\partial l / \partial f` and the kernel term over runs separately and then multiplies the averages. It also
    draws a new S for each run; here all runs share one.

    Args:
        projection: Dimension k of the random projection of gradients, see
            ``lightning_dtda.estimators.projection.Projection``. ``None`` for no projection; models with at most k
            parameters are not projected either.
        damping: :math:`\delta`; ``"auto"`` for the mean eigenvalue of the matrix, 0 for the pseudo-inverse as in the
            paper.
        seed: Seed of the projection.
        precision: ``"recorded"``, or ``"float64"`` to compute in double precision.
        memory_budget: Memory budget in GiB; examples and queries are processed in chunks that fit in it. The features
            of all examples, N x k numbers, are kept in memory.

    Raises:
        AttributionError: If an argument is out of range.
    """

    arguments = ("projection", "damping", "seed", "precision")
    passes_per_chunk = 4.0
    """Gradients of losses and of outputs, each by a forward and a backward pass."""

    def __init__(
        self,
        projection: int | None = 2048,
        damping: Damping = "auto",
        seed: int = 0,
        precision: Precision = "recorded",
        memory_budget: float = 1.0,
    ) -> None:
        super().__init__(precision, memory_budget)
        self.projection = check_dimension(projection)
        self.damping = check_damping(damping)
        self.seed = seed

    @override
    def plan(self, runs: Sequence[Run], question: Question) -> Plan:
        if question.measurement is loss:
            raise AttributionError(
                'TRAK needs a measurement that is an output of the model, not the "loss". Use measurement="margin" for '
                'classification, or "prediction" for regression.'
            )
        size = runs[0].layout.size
        dimension = size if self.projection is None else min(self.projection, size)
        examples = len(question.examples)
        itemsize = (runs[0].manifest.torch_dtype if self.precision == "recorded" else torch.float64).itemsize
        needed = (examples + _MATRICES * dimension) * dimension * itemsize
        if needed > self.memory_budget * GIB / 2:
            raise AttributionError(
                f"The features of {examples} examples in {dimension} dimensions, and their kernel, take "
                f"{human_bytes(needed)}; at most half of memory_budget={self.memory_budget:g} GiB can be used. Raise "
                "it, or give a smaller projection."
            )
        return super().plan(runs, question)

    @override
    def responder(self, replay: Replay, question: Question) -> Responder:
        objective = self.checked_objective(replay, question, _GRADIENTS)
        projection = projection_to(self.projection, objective.size, self.seed)
        features, slopes = _of_examples(replay, objective, question, projection)
        kernel = features.T @ features / objective.examples
        solve = _solver(kernel, self._resolved_damping(float(kernel.diagonal().mean())))
        weighted = features.mul_((slopes / objective.examples)[:, None]).T

        def respond(of_outputs: Tensor) -> list[Tensor]:
            return [solve(_projected(of_outputs, projection)) @ weighted]

        return respond

    def _resolved_damping(self, mean_eigenvalue: float) -> float:
        if self.damping != "auto":
            return float(self.damping)
        if not mean_eigenvalue > 0:
            raise AttributionError(
                'damping="auto" is relative to the mean eigenvalue, which is zero here: the measurement does not '
                "depend on the parameters for any training example. Use another measurement."
            )
        return mean_eigenvalue


def _solver(kernel: Tensor, damping: float) -> Callable[[Tensor], Tensor]:
    """Return the product of vectors ``(queries, k)`` with the inverse of the damped kernel ``(k, k)``.

    A Cholesky factor takes a small part of the time of eigenvectors, which only the pseudo-inverse needs.
    """
    if damping > 0:
        identity = torch.eye(len(kernel), dtype=kernel.dtype, device=kernel.device)
        factor, failed = torch.linalg.cholesky_ex(torch.add(kernel, identity, alpha=damping))
        if not failed:
            return lambda vectors: torch.cholesky_solve(vectors.T, factor).T
    spectrum = DenseSpectrum(kernel, None)  # rounding can exceed a small damping
    return lambda vectors: spectrum.solve(vectors, damping).vectors


def _of_examples(
    replay: Replay, objective: Objective, question: Question, projection: Projection | None
) -> tuple[Tensor, Tensor]:
    r"""Return the examples' features ``(N, k)`` and :math:`\partial l / \partial f` ``(N,)``."""
    width = objective.size if projection is None else projection.dimension
    features = objective.theta.new_empty(objective.examples, width)
    slopes = objective.theta.new_empty(objective.examples)
    of_examples = replace(question, queries=replay.examples)
    # held: the outputs' gradients, their products with the losses' gradients, and the previous chunk of the latter
    for indices, of_losses in objective.gradients(held=3):
        _, found, _ = of_examples.measure_with_gradients(replay, indices.tolist())
        of_outputs = found[0]
        squares = of_outputs.square().sum(1)
        slopes[indices] = torch.where(squares > 0, (of_losses * of_outputs).sum(1) / squares, 0)
        features[indices] = _projected(of_outputs, projection)
    return features, slopes


def _projected(gradients: Tensor, projection: Projection | None) -> Tensor:
    return gradients if projection is None else projection.forward(gradients)
