"""Real effect of suggested removals, by retraining without them."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_dtda.attribution.suggesting import GOALS, Suggestion
from lightning_dtda.errors import AttributionError
from lightning_dtda.retraining.ground_truth import GroundTruth
from lightning_dtda.statistics.student import student_interval


@dataclass(frozen=True)
class Verification:
    """Real change of the quantity that a suggestion was meant to change, averaged over its queries.

    Args:
        before: The quantity for models trained on everything.
        effect: Its change for models trained without all suggested examples.
        low: Lower limit of the effect's interval, by Student's t.
        high: Upper limit of the effect's interval.
        level: Confidence level of the interval.
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
    r"""Compare models retrained without the suggested examples with models trained on everything.

    The goal's quantity is a mean of contributions of the trainings, :math:`f(y) = \frac1S \sum_s c_s(y)` (see
    :func:`~lightning_dtda.suggest_removals`), and the effect is :math:`f(y) - f(x)`. Its error is that of the
    difference of two means (:func:`~lightning_dtda.statistics.student.student_interval`), or that of the mean of
    differences if both have the same seeds and therefore the same initial parameters.

    Args:
        suggestion: The suggestion; its queries are positions among the queries of the truth.
        truth: Ground truth whose subsets include the set of all suggested examples.
        level: Confidence level of the interval.

    Raises:
        AttributionError: If the truth lacks the set or some of its trainings, or there are fewer than two trainings
            with or without the examples.

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
            f"None of the ground truth's subsets is the set of the {len(wanted)} suggested examples. Retrain with "
            "subsets=[suggestion.removed]."
        )
    contributions = GOALS[suggestion.goal].contributions
    columns = list(suggestion.queries)
    real, baseline = truth.measurements[truth.removed.index(wanted)].double(), truth.baseline.double()
    paired = truth.seeds == truth.baseline_seeds
    for what, samples in (("without the suggested examples", real), ("on everything", baseline)):
        if len(samples) < 2 or not bool(samples.isfinite().all()):
            raise AttributionError(
                f"{int(samples.isfinite().all(1).sum())} of the {len(samples)} trainings {what} are available; all are "
                "needed, and at least two. Retrain the missing ones, with at least two seeds."
            )
    after, before = contributions(real[:, columns]), contributions(baseline[:, columns])
    low, high = student_interval(*([after - before] if paired else [after, before]), level=level).tolist()
    effect = float(after.mean() - before.mean())
    return Verification(float(before.mean()), effect, low, high, level, len(real), len(baseline))
