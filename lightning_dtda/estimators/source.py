"""Source: approximate unrolled differentiation with gradients and curvature constant in each segment of training."""

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
    r"""Responses by approximate unrolling: gradients and curvature are constant within each segment of training.

    Training is cut into L segments. With the Hessian :math:`H_l` of the mean training loss (or an approximation of it)
    and the examples' gradients, both at one step :math:`t_l` of each segment, and the sum :math:`\kappa_l` of the
    learning rates in the segment,

    .. math:: r_k = \frac1N \sum_{l = 1}^{L} \lambda_l^\top F_l\, \nabla l_k(\theta_{t_l}), \qquad
        F_l = \left(1 - e^{-\kappa_l H_l}\right) H_l^{-1}, \qquad
        \lambda_L = \nabla m(\theta_T), \quad \lambda_{l - 1} = e^{-\kappa_l H_l} \lambda_l,

    where :math:`F_l` is :math:`\kappa_l` along directions without curvature. Responses are predicted changes of m when
    an example is removed, in m's unit (Bae et al., *Training Data Attribution via Approximate Unrolled
    Differentiation*, arXiv 2405.12186, section 3). This is unrolled differentiation with each batch replaced by all
    examples and the steps by a gradient flow; one long segment gives an influence function. Unlike influence functions,
    it accounts for the length of training and the learning rates, and needs no damping: the curvature's damping is
    ignored.

    Difference from the paper: there, a segment's curvature and gradients are means over several checkpoints. Here they
    come from one step, where half of :math:`\kappa_l` has been reached; if it lies between two checkpoints, a replay
    rebuilds it. Instead of more checkpoints, use more segments, each with its own curvature. Learning rates are those
    recorded at each step.

    With momentum :math:`\mu`, a learning rate counts as :math:`\eta / (1 - \mu)`. For optimizers that scale the
    entries of the gradient (the Adam family, RMSprop, Adagrad, Adadelta) and for parameter groups with different
    learning rates, :math:`\kappa_l` is a diagonal matrix, with the second moments of step :math:`t_l`. With
    :math:`S_l^2 = \kappa_l`,

    .. math:: F_l = S_l \left(1 - e^{-S_l H_l S_l}\right) (S_l H_l S_l)^{-1} S_l, \qquad
        \lambda_{l - 1} = S_l^{-1} e^{-S_l H_l S_l} S_l \lambda_l .

    Decoupled weight decay is added to the exponent. Not modelled: which batches contained an example, its effect on the
    second moments, and gradient clipping. Losses are computed in evaluation mode.

    Args:
        segments: Number of segments L, with equal numbers of steps; or the first steps of all segments but the first,
            for example where the data or the learning rate change.
        curvature: :math:`H_l`, a curvature whose ``fit`` returns a :class:`~lightning_dtda.estimators.Spectrum`;
            :class:`~lightning_dtda.estimators.GaussNewton` if not given. ``EKFAC`` and ``KFAC`` are not supported if
            learning rates differ between parameters. ``EKFAC``'s matrix exponentials are not rescaled, unlike its
            solutions.
        precision: ``"recorded"``, or ``"float64"`` to compute in double precision.
        memory_budget: Memory budget in GiB; examples and queries are processed in chunks that fit in it. The curvature
            of every segment is fitted again for each chunk of queries.

    Raises:
        AttributionError: If an argument is out of range.
    """

    arguments = ("segments", "curvature", "precision")
    vectors = 8
    """Number of vectors of length P held per query: its adjoint, that of the segment, and those of a product."""

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
                    f"{type(self.curvature).__name__}, changes grew without bound. Use GaussNewton(), which has no "
                    "negative eigenvalues, or more segments."
                )
            return [total]

        return respond

    def _pull_back(
        self, replay: Replay, question: Question, part: Segment, adjoint: Tensor, is_first: bool
    ) -> tuple[Tensor, Tensor]:
        """Return a segment's part of the responses ``(Q, N)``, and unless it is the first, the adjoint before it."""
        objective = self.objective(replay, question, part.middle, scale=part.scale, decay=part.decay)
        spectrum = fit_spectrum(self.curvature, objective, "so there is no matrix exponential")
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
        # where the exponent is zero, the quotient is not used; dividing by one keeps it finite
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
        f"segments={segments!r}; give a positive number, or the first steps of all segments but the first, in "
        "ascending order."
    )
