"""Is one attribution better than another? The difference of their scores against one ground truth."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lightning_dtda.errors import AttributionError
from lightning_dtda.evaluation.evaluating import Evaluation
from lightning_dtda.statistics.crossed_bootstrap import difference_interval


@dataclass(frozen=True)
class Comparison:
    """Difference between two scores.

    Args:
        gain: First score minus the second.
        low: Lower limit of its interval.
        high: Upper limit of its interval.
    """

    gain: float
    low: float
    high: float

    @property
    def clear(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low > 0 or self.high < 0


def compare(first: Evaluation, second: Evaluation) -> dict[str, Comparison]:
    """Return how much higher the first attribution scores than the second, with intervals.

    Two attributions compared with the same truth share its randomness: its seeds, subsets and queries, and the recorded
    runs if both use the same ones. All of these are resampled jointly, see
    :func:`~lightning_dtda.statistics.crossed_bootstrap.difference_interval`, so the difference is known more precisely
    than the intervals of the scores suggest. Overlapping intervals do not show that two attributions are equally good.

    Args:
        first: Result of :func:`~lightning_dtda.evaluation.evaluate` for one attribution.
        second: Result for the other, with the same truth, ``replicates``, ``confidence`` and ``seed``.

    Returns:
        Comparison for each difference between distributions that both have a score for, by name; limits are NaN if an
        evaluation has no draws.

    Raises:
        AttributionError: If the two evaluations use different truths, confidence levels or draws.

    Example:
        >>> import torch
        >>> from lightning_dtda import Attribution, GroundTruth
        >>> from lightning_dtda.evaluation import evaluate
        >>> generator = torch.Generator().manual_seed(0)
        >>> responses = torch.randn(3, 1, 6, generator=generator)
        >>> good = Attribution(torch.zeros(3, 1), responses, ("a", "b", "c"), (0,))
        >>> bad = Attribution(torch.zeros(3, 1), -responses, ("a", "b", "c"), (0,))
        >>> removed = ((0, 1), (2, 3), (4, 5), (0, 5))
        >>> real = torch.stack([good.predict(subset) for subset in removed])
        >>> truth = GroundTruth(real, torch.zeros(3, 1), removed, (0,), (7, 8, 9), (7, 8, 9))
        >>> compare(*(evaluate(each, truth, ["mean"]) for each in (good, bad)))["mean"].gain
        2.0
    """
    for what, one, other in (
        ("ground truth", first.truth_checksum, second.truth_checksum),
        ("confidence", first.confidence, second.confidence),
    ):
        if one != other:
            raise AttributionError(
                f"The evaluations differ in their {what}: {one} and {other}. Evaluate both with the same {what}."
            )
    return {name: _compared(first, second, name) for name in first.scores if name in second.scores}


def _compared(first: Evaluation, second: Evaluation, name: str) -> Comparison:
    one, other = first.scores[name], second.scores[name]
    apart, (of_one, of_other) = one.score - other.score, (one.replicates, other.replicates)
    if of_one is None or of_other is None:
        return Comparison(apart, float("nan"), float("nan"))
    if not torch.equal(of_one.queries, of_other.queries):
        raise AttributionError(
            "The evaluations have different draws. Evaluate both with the same replicates and the same seed."
        )
    low, high = difference_interval(of_one, of_other, first.confidence)
    return Comparison(apart, float(low), float(high))
