"""Source: unrolled differentiation of a training whose gradients and curvature are stationary piece by piece."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from lightning_dtda.errors import AttributionError
from lightning_dtda.estimators.at_checkpoints import CheckpointEstimator, Responder
from lightning_dtda.estimators.curvatures.curvature import Curvature
from lightning_dtda.estimators.curvatures.gauss_newton import resolve_curvature
from lightning_dtda.estimators.curvatures.spectrum import Function, fit_spectrum
from lightning_dtda.estimators.estimator import Question
from lightning_dtda.estimators.objective import Objective
from lightning_dtda.estimators.segments import Segment, boundaries, segment
from lightning_dtda.replay import Precision, Replay
from lightning_dtda.trajectory import Run


class Source(CheckpointEstimator):
    r"""Responses of a training cut into segments, in each of which gradients and curvature are taken for stationary.

    With the mean training loss's Hessian :math:`H_l`, or a matrix in its place, and the examples' gradients at one step
    :math:`t_l` of each of the L segments, and the sum :math:`\kappa_l` of the learning rates of the segment's steps,

    .. math:: r_k = \frac1N \sum_{l = 1}^{L} \lambda_l^\top F_l\, \nabla l_k(\theta_{t_l}), \qquad
        F_l = \left(1 - e^{-\kappa_l H_l}\right) H_l^{-1}, \qquad
        \lambda_L = \nabla m(\theta_T), \quad \lambda_{l - 1} = e^{-\kappa_l H_l} \lambda_l,

    where :math:`F_l` is :math:`\kappa_l` along directions without curvature: predicted changes of m when an example is
    removed, in m's unit (Bae et al., *Training Data Attribution via Approximate Unrolled Differentiation*, arXiv
    2405.12186, section 3). It is unrolled differentiation with every batch replaced by all examples and small steps
    by a flow; and one long segment is an influence function. Unlike the latter, it knows how long the training was and
    what its rates were, and needs no damping: that of the curvature plays no part.

    It differs from the paper in this. There, curvature and gradients of a segment are means over several checkpoints;
    here they are those of one step, at which half of :math:`\kappa_l` is gone, and which is rebuilt by a replay where
    it is between two checkpoints. More segments take the place of more checkpoints, with their curvatures kept apart.
    The learning rates are those that were recorded, step by step.

    With momentum :math:`\mu`, a rate counts as :math:`\eta / (1 - \mu)`. An optimizer that scales each gradient's
    entries (Adam and its kin, RMSprop, Adagrad, Adadelta), and parameter groups with rates of their own, make
    :math:`\kappa_l` a diagonal matrix, with the second moments of step :math:`t_l`; with :math:`S_l^2 = \kappa_l`,

    .. math:: F_l = S_l \left(1 - e^{-S_l H_l S_l}\right) (S_l H_l S_l)^{-1} S_l, \qquad
        \lambda_{l - 1} = S_l^{-1} e^{-S_l H_l S_l} S_l \lambda_l .

    Decoupled weight decay is added to the exponent. Left out are: which batches an example was in, that it changes the
    second moments, and clipping. Losses are those of the module in evaluation mode.

    Args:
        segments: L, for segments with equally many steps; or the steps at which all but the first begin, say where the
            training's data or its rate change.
        curvature: What stands for :math:`H_l`: one whose fit is a :class:`~lightning_dtda.estimators.Spectrum`;
            :class:`~lightning_dtda.estimators.GaussNewton` if not given. Where rates differ between parameters,
            ``EKFAC`` and ``KFAC`` are refused. ``EKFAC``'s exponentials are not rescaled as its solutions are.
        precision: ``"recorded"``, or ``"float64"`` to compute in double.
        memory_budget: In GiB; examples and queries are worked on in chunks that stay below it. For each chunk of
            queries, every segment's curvature is fitted.

    Raises:
        AttributionError: If an argument is out of range.
    """

    arguments = ("segments", "curvature", "precision")
    vectors = 8
    """Vectors of P numbers that each query needs at once: its adjoint, that of the segment, and those of a product."""

    def __init__(
        self,
        segments: int | list[int] = 3,
        curvature: Curvature | None = None,
        precision: Precision = "recorded",
        memory_budget: float = 1.0,
    ) -> None:
        super().__init__(precision, memory_budget)
        self.segments = _check_segments(segments)
        self.curvature = resolve_curvature(curvature)

    @override
    def passes(self, runs: Sequence[Run], question: Question, objective: Objective) -> float:
        counts = [len(boundaries(self.segments, run, question.end(run.steps))) for run in runs]
        return sum(counts) / len(counts) * (1 + self.curvature.passes(objective))

    @override
    def responder(self, replay: Replay, question: Question) -> Responder:
        run = replay.runs[0]
        cuts = boundaries(self.segments, run, question.end(run.steps))
        segments = [part for part in (segment(replay, first, last) for first, last in cuts) if part.total > 0]
        for part in segments:
            replay.check_step(part.middle)

        def respond(adjoint: Tensor) -> list[Tensor]:
            total = adjoint.new_zeros(len(adjoint), len(question.examples))
            for part in reversed(segments):
                slopes, adjoint = self._pull_back(replay, question, part, adjoint, is_first=part is segments[0])
                total += slopes
            if not bool(torch.isfinite(total).all()):
                raise AttributionError(
                    f"The responses of {run.path} are not finite: along negative eigenvalues of "
                    f"{type(self.curvature).__name__} changes grew without bounds. Use GaussNewton(), which has none, "
                    "or more segments."
                )
            return [total]

        return respond

    def _pull_back(
        self, replay: Replay, question: Question, part: Segment, adjoint: Tensor, is_first: bool
    ) -> tuple[Tensor, Tensor]:
        """Return a segment's share of the responses ``(Q, N)``, and the adjoint ``(Q, P)`` before it, unless first."""
        objective = self.objective(replay, question, part.middle, scale=part.scale, decay=part.decay)
        spectrum = fit_spectrum(self.curvature, objective, "hence no matrix exponential")
        scaled = adjoint if part.scale is None else adjoint * part.scale
        slopes = objective.slopes(spectrum.apply(accumulated(part.total), scaled)) / objective.examples
        if is_first:
            return slopes, adjoint
        before = spectrum.apply(propagated(part.total), scaled)
        return slopes, before if part.scale is None else before / part.scale


def accumulated(total: float) -> Function:
    r"""Return :math:`\sigma \mapsto (1 - e^{-\kappa\sigma}) / \sigma`, and :math:`\kappa` at zero.

    Example:
        >>> accumulated(3.0)(torch.tensor([0.0, 1e-9, 100.0]))
        tensor([3.0000, 3.0000, 0.0100])
    """

    def function(values: Tensor) -> Tensor:
        exponents = total * values
        # where it is zero, the quotient is not used; one in its place keeps it finite
        safe = torch.where(exponents == 0, 1, exponents)
        return total * torch.where(exponents == 0, 1, -torch.expm1(-safe) / safe)

    return function


def propagated(total: float) -> Function:
    r"""Return :math:`\sigma \mapsto e^{-\kappa\sigma}`."""
    return lambda values: torch.exp(-total * values)


def _check_segments(segments: int | Sequence[int]) -> int | list[int]:
    if isinstance(segments, int) and not isinstance(segments, bool) and segments > 0:
        return segments
    if isinstance(segments, (list, tuple)):
        starts = list(segments)
        whole = all(isinstance(start, int) and not isinstance(start, bool) for start in starts)
        if whole and all(before < after for before, after in zip([0, *starts], starts, strict=False)):
            return starts
    raise AttributionError(
        f"segments={segments!r}; give a positive number, or the steps at which all segments but the first begin, "
        "ascending."
    )
