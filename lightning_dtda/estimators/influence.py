"""Influence functions: responses at the end of training, from the inverse of a curvature matrix."""

from __future__ import annotations

from collections.abc import Sequence

from typing_extensions import override

from lightning_dtda.estimators.at_checkpoints import Answer, CheckpointEstimator, Responder, answer_in_chunks
from lightning_dtda.estimators.curvatures.curvature import Curvature, Damping, check_damping, resolve_damping
from lightning_dtda.estimators.curvatures.gauss_newton import resolve_curvature
from lightning_dtda.estimators.estimator import Advance, Estimate, Plan, Question
from lightning_dtda.estimators.objective import Objective
from lightning_dtda.replay import Precision, Replay
from lightning_dtda.trajectory import Run


class InfluenceFunctions(CheckpointEstimator):
    r"""Responses at the end of training, from the inverse of a curvature matrix.

    .. math:: r_k = \frac1N \nabla m(\theta_T)^\top (H + \delta)^{-1} \nabla l_k(\theta_T)

    where H is the Hessian of the mean training loss or an approximation of it. Responses are predicted changes of m
    when an example is removed, in m's unit. This is the limit of unrolled differentiation for long training with small
    steps (Mlodozeniec et al., arXiv 2506.12965, theorem 2; Koh and Liang, arXiv 1703.04730, section 2). It does not
    account for batch order or the optimizer.

    Losses are computed in evaluation mode (no dropout, running statistics for BatchNorm), one example at a time. Only a
    run's last checkpoint is used; the gradient of one step is recomputed and compared with the record, to make sure
    that the module and the data are those of the training.

    Args:
        curvature: H and its damping; :class:`~lightning_dtda.estimators.GaussNewton` if not given.
        precision: ``"recorded"``, or ``"float64"`` to compute in double precision.
        memory_budget: Memory budget in GiB; examples and queries are processed in chunks that fit in it.

    Raises:
        AttributionError: If an argument is out of range.
    """

    arguments = ("curvature", "precision")
    vectors = 8
    """Number of vectors of length P held per query: its gradient, and those of an iterative solution."""

    def __init__(
        self, curvature: Curvature | None = None, precision: Precision = "recorded", memory_budget: float = 1.0
    ) -> None:
        super().__init__(precision, memory_budget)
        self.curvature = resolve_curvature(curvature)

    @override
    def passes(self, runs: Sequence[Run], question: Question, objective: Objective) -> float:
        return 1 + self.curvature.passes(objective)

    @override
    def responder(self, replay: Replay, question: Question) -> Responder:
        return self._responder(replay, question, [self.curvature.damping])

    def estimate_dampings(
        self, runs: Sequence[Run], question: Question, plan: Plan, advance: Advance, dampings: Sequence[Damping]
    ) -> list[Estimate]:
        """Answer the question for one batch of the plan with several dampings; the curvature is fitted once per run.

        Args:
            runs: One batch of runs.
            question: The question.
            plan: The plan.
            advance: Called with the number of steps done.
            dampings: Values that replace the damping of the curvature.

        Returns:
            One estimate for each damping.
        """

        def answer(replay: Replay) -> Answer:
            return answer_in_chunks(replay, question, plan, self._responder(replay, question, dampings))

        return self.estimates(runs, question, advance, answer)

    def _responder(self, replay: Replay, question: Question, dampings: Sequence[Damping]) -> Responder:
        objective = self.checked_objective(replay, question)
        fitted = self.curvature.fit(objective)
        given = [resolve_damping(check_damping(damping), self.curvature, fitted) for damping in dampings]
        return lambda gradients: [
            objective.slopes(fitted.solve(gradients, d).vectors) / objective.examples for d in given
        ]
