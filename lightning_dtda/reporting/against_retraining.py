"""Predictions beside retraining, in words and as columns for a figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_dtda.attribution.attribution import Attribution
from lightning_dtda.attribution.suggesting import GOALS, Suggestion, effect_text
from lightning_dtda.evaluation.evaluating import Score, check_alignment, evaluate, predicted_samples
from lightning_dtda.evaluation.verification import verify
from lightning_dtda.reporting.certainty import LEVEL
from lightning_dtda.reporting.formatting import MINUS, capital
from lightning_dtda.reporting.wording import counted, describe, noun
from lightning_dtda.retraining.ground_truth import GroundTruth
from lightning_dtda.statistics.differences import Difference
from lightning_dtda.statistics.student import student_interval

FEWEST_TO_RANK = 3
"""Number of removals from which their order can be compared."""

FEWEST_TO_VERIFY = 3
"""Number of trainings with and without a set from which its effect has an interval."""

_GOALS = {"mean": "improve_mean", "spread": "reduce_variance"}
"""Goals whose quantity, over retrainings, is that of a difference."""


@dataclass(frozen=True)
class Retrained:
    """What retraining says of an attribution.

    Args:
        said: What was retrained, and how well predictions agree, in sentences.
        subsets: What was removed, in words.
        differences: For each difference, influences as predicted and as retrained, with intervals where there are any:
            lists ``(queries, subsets)`` by ``"predicted"``, ``"retrained"``, ``"low"`` and ``"high"``.
    """

    said: tuple[str, ...]
    subsets: tuple[str, ...]
    differences: tuple[dict[str, Any], ...]


def retrained(attribution: Attribution, truth: GroundTruth, differences: Sequence[Difference]) -> Retrained:
    """Compare predictions with retraining.

    Args:
        attribution: The attribution, restricted to the runs to use.
        truth: Ground truth for the same queries and measurement, without missing trainings.
        differences: Differences to compare.

    Raises:
        AttributionError: If the attribution and the truth do not match.
    """
    check_alignment(attribution, truth)
    predicted = predicted_samples(attribution, truth)
    few = min(len(attribution.runs), len(truth.seeds), len(truth.baseline_seeds))
    possible = [
        each if few >= each.least_runs and not (each.paired and len(truth.seeds) != len(truth.baseline_seeds)) else None
        for each in differences
    ]
    said = [
        f"{counted(len(truth.removed), 'removal was', 'removals were')} retrained with "
        f"{counted(len(truth.seeds), 'seed')} each, and with {len(truth.baseline_seeds)} on all data "
        f"({truth.removal}: {_MEANING.get(truth.removal, 'see the ground truth')})."
    ]
    if len(truth.removed) >= FEWEST_TO_RANK:
        ranked = [each for each in possible if each is not None]
        scores = evaluate(attribution, truth, ranked, runs="all").scores
        said += [_agreement(scores[each.name], describe(each, attribution.measurement).title) for each in ranked]
    return Retrained(
        tuple(said),
        tuple(_removed(attribution, subset) for subset in truth.removed),
        tuple({} if each is None else _influences(attribution, truth, predicted, each) for each in possible),
    )


_MEANING = {
    "drop": "without the examples, on new seeds",
    "reweight": "with weight zero, in the recorded batch order",
}


def suggested(suggestion: Suggestion, truth: GroundTruth | None) -> list[str]:
    """Return what a suggestion says, and what retraining says of it if its set was retrained, in sentences."""
    said = [suggestion.verdict]
    if truth is None or min(len(truth.seeds), len(truth.baseline_seeds)) < FEWEST_TO_VERIFY:
        return said
    if suggestion.best and tuple(sorted(suggestion.removed)) in truth.removed:
        found = verify(suggestion, truth, LEVEL)
        real = effect_text(suggestion.goal, found.effect, found.low, found.high)
        said.append(
            f"Retrained {found.seeds} times without the suggested examples and {found.baseline_seeds} times on all "
            f"data: the {suggestion.quantity} was {found.before:.3g} and changed by {real}; predicted was "
            f"{suggestion.effect(suggestion.best)}."
        )
    return said


def _agreement(score: Score, title: str) -> str:
    """Return how well predictions rank the removals, in a sentence."""
    ends = "" if math.isnan(score.low) else f" [{_signed(score.low)}, {_signed(score.high)}]"
    ceiling = (
        "too few seeds for a noise ceiling"
        if score.ceiling is None
        else f"noise ceiling {_signed(score.ceiling)}: exact predictions would score that"
    )
    return f"{capital(title)}: rank correlation of predicted and retrained {_signed(score.score)}{ends} ({ceiling})."


def _signed(value: float) -> str:
    return f"{value:.2f}".replace("-", MINUS)


def _removed(attribution: Attribution, subset: Sequence[int], most: int = 3) -> str:
    """Return what was removed, in words."""
    for name, members in zip(attribution.removals or (), attribution.members or (), strict=True):
        if set(members) == set(subset):
            return f"{noun(attribution)} {name}"
    names = [attribution.gallery.example(index).name or str(index) for index in subset[:most]]
    rest = f" and {len(subset) - most} more" if len(subset) > most else ""
    return f"{'example' if len(subset) == 1 else 'examples'} {', '.join(names)}{rest}"


def _influences(
    attribution: Attribution, truth: GroundTruth, predicted: Tensor, difference: Difference
) -> dict[str, Any]:
    of_queries: dict[str, list[list[float]]] = {"predicted": [], "retrained": [], "low": [], "high": []}
    real = truth.influence(difference)
    for query in range(len(truth.queries)):
        before = attribution.baseline[:, query, None].double()
        of_queries["predicted"].append(_shown(difference, difference(before, predicted[:, :, query].T)))
        of_queries["retrained"].append(_shown(difference, real[query]))
        for key, ends in zip(("low", "high"), _interval(truth, query, difference), strict=True):
            of_queries[key].append(_shown(difference, ends))
    return of_queries


def _interval(truth: GroundTruth, query: int, difference: Difference) -> Tensor:
    """Return intervals of what retraining found on a query ``(2, subsets)``; NaN if there are none."""
    goal = _GOALS.get(difference.name)
    if goal is None or min(len(truth.seeds), len(truth.baseline_seeds)) < FEWEST_TO_VERIFY:
        return torch.full((2, len(truth.removed)), torch.nan, dtype=torch.float64)
    paired = truth.seeds == truth.baseline_seeds
    before = GOALS[goal].of_runs(truth.baseline[:, [query]].double())
    ends = []
    for subset in truth.measurements:
        after = GOALS[goal].of_runs(subset[:, [query]].double())
        ends.append(student_interval(*([after - before] if paired else [after, before]), level=LEVEL))
    return torch.stack(ends, 1)


def _shown(difference: Difference, values: Tensor) -> list[float]:
    return [difference.shown(value) for value in values.tolist()]
