"""Real effect of suggested removals, by retraining without them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lightning_dtda.attribution.suggesting import GOALS, Suggestion
from lightning_dtda.errors import AttributionError
from lightning_dtda.retraining.ground_truth import GroundTruth
from lightning_dtda.statistics.student import student_interval


@dataclass(frozen=True)
class Verification:
    """Real change of the quantity that a suggestion was meant to change, averaged over its queries.

    Args:
        before: The quantity for models trained on everything.
        effect: Its change for models trained without the suggested examples; for a standard deviation, relative.
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


def verify(suggestion: Suggestion, truth: GroundTruth, level: float = 0.95, step: int | None = None) -> Verification:
    r"""Compare models retrained without the suggested examples with models trained on everything.

    The effect is the goal's quantity (see :func:`~lightning_dtda.suggest_removals`) without the examples less the
    quantity with them. Its interval is Student's, of what each training adds to the quantity
    (:func:`~lightning_dtda.statistics.student.student_interval`): of the difference of two means, or of the mean of
    differences if both have the same seeds and therefore the same initial parameters.

    Args:
        suggestion: The suggestion; its queries are positions among the queries of the truth.
        truth: Ground truth whose subsets include the set of the suggested examples.
        level: Confidence level of the interval.
        step: Number of removals to verify; ``None`` means the suggested one, :attr:`Suggestion.best`.

    Raises:
        AttributionError: If there are no removals to verify, the truth lacks the set or some of its trainings, or
            there are fewer than three trainings with or without the examples.

    Example:
        >>> import torch
        >>> from lightning_dtda import Attribution, suggest_removals
        >>> x = torch.linspace(-1, 1, 8)[:, None]
        >>> attribution = Attribution(x, -0.5 * x[..., None], tuple(f"seed-{s:04d}" for s in range(8)), (0,))
        >>> suggestion = suggest_removals(attribution, k=1)
        >>> truth = GroundTruth(0.5 * x[None], x, ((0,),), (0,), tuple(range(8)), tuple(range(8)))
        >>> round(verify(suggestion, truth).effect, 6)  # half the standard deviation
        -0.5
    """
    step = suggestion.best if step is None else step
    if not 1 <= step <= len(suggestion.removals):
        raise AttributionError(
            f"There are no removals to verify ({suggestion.verdict}) Give step=1 to {len(suggestion.removals)}, the "
            "number of removals, to verify them all the same."
            if suggestion.removals
            else suggestion.verdict
        )
    wanted = tuple(sorted(suggestion.sets[step - 1]))
    if wanted not in truth.removed:
        raise AttributionError(
            f"None of the ground truth's subsets is the set of the {len(wanted)} suggested examples. Retrain with "
            f"subsets=[suggestion.sets[{step - 1}]]."
        )
    goal = GOALS[suggestion.goal]
    columns = list(suggestion.queries)
    real, baseline = truth.measurements[truth.removed.index(wanted)].double(), truth.baseline.double()
    paired = truth.seeds == truth.baseline_seeds
    for what, samples in (("without the suggested examples", real), ("on everything", baseline)):
        if len(samples) < 3 or not bool(samples.isfinite().all()):
            raise AttributionError(
                f"{int(samples.isfinite().all(1).sum())} of the {len(samples)} trainings {what} are available; all are "
                "needed, and at least three. Retrain the missing ones, with at least three seeds."
            )
    after, before = goal.of_runs(real[:, columns]), goal.of_runs(baseline[:, columns])
    ends = student_interval(*([after - before] if paired else [after, before]), level=level)
    effect, low, high = goal.shown(torch.stack([after.mean() - before.mean(), *ends])).tolist()
    was = float(before.mean().exp() if goal.spread else before.mean())
    return Verification(was, effect, low, high, level, len(real), len(baseline))
