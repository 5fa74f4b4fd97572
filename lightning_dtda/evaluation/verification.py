"""What a suggestion of removals really does, by retraining without them."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_dtda.attribution.suggesting import GOALS, Suggestion
from lightning_dtda.errors import AttributionError
from lightning_dtda.retraining.ground_truth import GroundTruth
from lightning_dtda.statistics.intervals import student_interval


@dataclass(frozen=True)
class Verification:
    """The real change of the quantity that a suggestion was to change, averaged over its queries.

    Args:
        before: The quantity, of models trained on everything.
        effect: Its change, of models trained without all suggested examples.
        low: Lower limit of the effect's interval, by Student's t.
        high: Upper limit.
        level: Of the interval.
        seeds: Number of trainings without the examples.
        baseline_seeds: Number of trainings on everything.
    """

    before: float
    effect: float
    low: float
    high: float
    level: float
    seeds: int
    baseline_seeds: int


def verify(suggestion: Suggestion, truth: GroundTruth, level: float = 0.95) -> Verification:
    r"""Compare models that were really trained without the suggested examples with those trained on everything.

    With the goal's quantity as a mean over trainings of what each adds, :math:`f(y) = \frac1S \sum_s c_s(y)` (see
    :func:`~lightning_dtda.suggest_removals`), the effect is :math:`f(y) - f(x)`. Its error is that of the difference
    of two means (:func:`~lightning_dtda.statistics.intervals.student_interval`); of the mean of differences, where both
    have the same seeds and hence the same initial parameters.

    Args:
        suggestion: What was suggested; its queries are those positions of the truth's.
        truth: Has the set of all suggested examples among its subsets.
        level: Of the interval.

    Raises:
        AttributionError: If the truth lacks the set, or trainings of it; or there are fewer than two of either kind.

    Example:
        >>> import torch
        >>> from lightning_dtda import Attribution, suggest_removals
        >>> x = torch.linspace(-1, 1, 8)[:, None]
        >>> attribution = Attribution(x, -0.5 * x[..., None], tuple(f"seed-{s:04d}" for s in range(8)), (0,))
        >>> suggestion = suggest_removals(attribution, k=1)
        >>> truth = GroundTruth(0.5 * x[None], x, ((0,),), (0,), tuple(range(8)), tuple(range(8)))
        >>> round(verify(suggestion, truth).effect / verify(suggestion, truth).before, 6)
        -0.75
    """
    wanted = tuple(sorted(suggestion.removed))
    if wanted not in truth.removed:
        raise AttributionError(
            f"The ground truth has no subset of the {len(wanted)} suggested examples. Retrain with "
            "subsets=[suggestion.removed]."
        )
    contributions = GOALS[suggestion.goal].contributions
    columns = list(suggestion.queries)
    real, baseline = truth.measurements[truth.removed.index(wanted)].double(), truth.baseline.double()
    paired = truth.seeds == truth.baseline_seeds
    for what, samples in (("without the suggested examples", real), ("on everything", baseline)):
        if len(samples) < 2 or not bool(samples.isfinite().all()):
            raise AttributionError(
                f"Of the trainings {what}, {int(samples.isfinite().all(1).sum())} of {len(samples)} are there; all are "
                "needed, and at least two. Retrain what is missing."
            )
    after, before = contributions(real[:, columns]), contributions(baseline[:, columns])
    low, high = student_interval(*([after - before] if paired else [after, before]), level=level).tolist()
    effect = float(after.mean() - before.mean())
    return Verification(float(before.mean()), effect, low, high, level, len(real), len(baseline))
