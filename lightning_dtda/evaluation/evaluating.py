"""Evaluation of an attribution against ground truth: do its predictions agree with retraining?"""

from __future__ import annotations

import math
import re
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lightning_dtda.attribution.attribution import Attribution, Runs
from lightning_dtda.attribution.sources import refuse_crossed
from lightning_dtda.errors import AttributionError
from lightning_dtda.evaluation.functional.agreement import REPLICATES, agreement
from lightning_dtda.retraining.ground_truth import GroundTruth
from lightning_dtda.statistics.crossed_bootstrap import Replicates
from lightning_dtda.statistics.differences import DIFFERENCES, PAPERS, Difference, resolve_difference
from lightning_dtda.statistics.samples import arrange, collect

_SEED = re.compile(r"seed-(\d+)$")
"""Names of runs that were recorded after ``seed_everything``."""


@dataclass(frozen=True)
class Score:
    """Linear datamodeling score of one difference.

    See :func:`~lightning_dtda.evaluation.functional.linear_datamodeling_score`.

    Args:
        score: The score.
        low: Lower limit of its interval.
        high: Upper limit of its interval.
        ceiling: Best score that the noise of the truth allows; ``None`` if there are too few seeds to estimate it.
        reliability: Square of the ceiling: the score that an equally large truth with other seeds would get.
        per_query: Score of each query; ``None`` where its real influence is the same for all subsets.
        constant_predictions: Number of queries whose correlation is 0 because all predictions are the same.
        replicates: Resampled correlations behind the interval; ``None`` if there is no interval.
    """

    score: float
    low: float
    high: float
    ceiling: float | None
    reliability: float | None
    per_query: tuple[float | None, ...]
    constant_predictions: int
    replicates: Replicates | None = field(default=None, repr=False, compare=False)

    @property
    def constant_queries(self) -> int:
        """Number of queries that do not count."""
        return self.per_query.count(None)


@dataclass(frozen=True)
class Evaluation:
    """How well an attribution predicts retraining.

    Args:
        scores: Scores by name of the difference.
        measurement: Name of the measurement.
        removal: Meaning of removal in the truth, ``"drop"`` or ``"reweight"``; predictions are for ``"reweight"``.
        runs: Number of recorded runs used.
        left_out: Names of the chaotic runs that were left out.
        subsets: Number of removals that were retrained.
        seeds: Number of trainings without each subset.
        baseline_seeds: Number of trainings on everything.
        queries: Number of queries.
        shared_seeds: Seeds that were both recorded and retrained.
        confidence: Confidence level of the intervals.
        run_names: Names of the recorded runs used.
        truth_checksum: Checksum of the truth; it differs between different truths.
    """

    scores: dict[str, Score]
    measurement: str
    removal: str
    runs: int
    left_out: tuple[str, ...]
    subsets: int
    seeds: int
    baseline_seeds: int
    queries: int
    shared_seeds: tuple[int, ...]
    confidence: float
    run_names: tuple[str, ...]
    truth_checksum: int

    def content(self) -> dict[str, Any]:
        """Return the evaluation as plain data for JSON."""
        scores = {name: {**vars(score)} for name, score in self.scores.items()}
        for score in scores.values():
            del score["replicates"]
        return vars(self) | {"scores": scores}


def evaluate(
    attribution: Attribution,
    truth: GroundTruth,
    differences: Sequence[str | Difference] | None = None,
    *,
    runs: Runs = "trusted",
    replicates: int = REPLICATES,
    confidence: float = 0.95,
    seed: int = 0,
) -> Evaluation:
    """Compute an attribution's distributional linear datamodeling scores.

    The samples that :meth:`~lightning_dtda.Attribution.predict` gives for each subset of the truth are compared with
    those of the retrained models (arXiv 2506.12965, section 5). If trainings are missing, only the complete part of the
    truth is used.

    Args:
        attribution: Attribution to evaluate. If its removals are groups, each subset must consist of whole groups.
        truth: Ground truth from retraining, for the same data, queries and measurement.
        differences: As for :class:`~lightning_dtda.evaluation.LinearDatamodelingScore`; ``None`` for those of the paper
            that there are enough runs and seeds for.
        runs: ``"trusted"`` to leave out the runs that the attribution reports as chaotic, or ``"all"``.
        replicates: Number of bootstrap draws for the intervals; 0 skips them.
        confidence: Confidence level of the intervals.
        seed: Seed of the draws.

    Returns:
        Scores with intervals and noise ceilings, and what they were computed from.

    Raises:
        AttributionError: If the attribution and the truth do not match; if there is nothing to compare; or if there are
            too few runs or seeds for a requested difference.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> responses = torch.randn(3, 1, 6, generator=generator)
        >>> attribution = Attribution(torch.zeros(3, 1), responses, ("a", "b", "c"), (0,))
        >>> removed = ((0, 1), (2, 3), (4, 5), (0, 5))
        >>> real = torch.stack([attribution.predict(subset) for subset in removed])
        >>> truth = GroundTruth(real, torch.zeros(3, 1), removed, (0,), (7, 8, 9), (7, 8, 9))
        >>> evaluate(attribution, truth, ["mean"]).scores["mean"].score
        1.0
    """
    if truth.unfinished:
        missing, truth = len(truth.unfinished), truth.finished()
        warnings.warn(
            f"{missing} trainings of the ground truth are missing. The {len(truth.removed)} subsets with "
            f"{len(truth.seeds)} seeds that are complete are compared.",
            stacklevel=2,
        )
    check_alignment(attribution, truth)
    left_out = attribution.chaotic if runs == "trusted" else ()
    selected = attribution._selected(runs)
    refuse_crossed(selected, "a score with an interval over runs")
    of_runs = [int(match[1]) if (match := _SEED.search(run)) else None for run in selected.runs]
    shared = tuple(sorted({*truth.seeds, *truth.baseline_seeds} & set(of_runs) - {None}))
    if shared:
        other = "removal='drop'" if truth.removal == "reweight" else "other seeds"
        warnings.warn(
            f"{len(shared)} seeds were both recorded and retrained ({shared[0]}, ...), so truth and prediction share "
            f"noise: the scores hold for these runs only and may exceed the noise ceiling. To learn about the "
            f"distribution, retrain with {other}.",
            stacklevel=2,
        )
    samples = collect(
        arrange(predicted_samples(selected, truth), selected.baseline, truth.measurements, truth.baseline),
        paired=truth.seeds == truth.baseline_seeds,
        repeated=truth.removal == "reweight" and tuple(of_runs) == truth.seeds,
    )
    if differences is None:
        least = min(len(selected.runs), len(truth.seeds), len(truth.baseline_seeds))
        differences = [name for name in PAPERS if least >= DIFFERENCES[name].least_runs]
    scores = {}
    for difference in map(resolve_difference, differences):
        found = agreement(samples, difference, "spearman", replicates, confidence, seed, selected.runs)
        scores[difference.name] = _score(*found)
    return Evaluation(
        scores,
        truth.measurement,
        truth.removal,
        len(selected.runs),
        left_out,
        len(truth.removed),
        len(truth.seeds),
        len(truth.baseline_seeds),
        len(truth.queries),
        shared,
        confidence,
        selected.runs,
        _checksum(truth),
    )


def check_alignment(attribution: Attribution, truth: GroundTruth) -> None:
    """Check that an attribution and a ground truth are about the same thing.

    Properties that either does not record, for example because it was made by hand, are not compared.

    Raises:
        AttributionError: If they differ. The message names the property.
    """
    of_data, trained_on = attribution.about.get("configuration", {}).get("dataset", {}), truth.about.get("data", {})
    compared: dict[str, tuple[Any, Any]] = {
        "measurement": (attribution.about.get("measurement"), truth.about.get("measurement")),
        "draws of the measurement": (attribution.about.get("draws"), truth.about.get("draws")),
        "queries": (attribution.queries, truth.queries),
        "data set of the queries (fingerprints)": (
            attribution.about.get("queries_fingerprint"),
            truth.about.get("queries_fingerprint"),
        ),
        "number of training examples": (of_data.get("length"), trained_on.get("length")),
        "training data (fingerprints)": (of_data.get("fingerprint"), trained_on.get("fingerprint")),
    }
    for what, (predicted, retrained) in compared.items():
        if None not in (predicted, retrained) and predicted != retrained:
            raise AttributionError(
                f"Attribution and ground truth differ in their {what}: {_short(predicted)} and {_short(retrained)}. "
                "Attribute or retrain again so that they agree."
            )
    if attribution.step is not None:
        raise AttributionError(
            f"The attribution is for the models after step {attribution.step}, but the ground truth is for fully "
            "trained models. Attribute again without step."
        )


def predicted_samples(attribution: Attribution, truth: GroundTruth) -> Tensor:
    """Return the predicted samples without each subset of the truth ``(subsets, runs, queries)``, float64.

    Raises:
        AttributionError: If the attribution cannot predict the removal of a subset.
    """
    # in double precision: a change of the variance is a small difference of large squares
    precise = replace(attribution, baseline=attribution.baseline.double())
    members = attribution.members
    return torch.stack(
        [
            precise.predict(list(subset) if members is None else _groups_of(subset, members, number))
            for number, subset in enumerate(truth.removed)
        ]
    )


def _groups_of(subset: Sequence[int], members: Sequence[Sequence[int]], number: int) -> list[int]:
    """Return the positions of the groups that a subset consists of, the largest first."""
    left, found = set(subset), []
    for position in sorted(range(len(members)), key=lambda group: -len(members[group])):
        if members[position] and left.issuperset(members[position]):
            left -= set(members[position])
            found.append(position)
    if left:
        raise AttributionError(
            f"Subset {number} of the ground truth removes training example {min(left)}, but contains no whole group of "
            "the attribution with this example. Attribute every example (removals='leave-one-out'), or retrain without "
            "whole groups."
        )
    return found


def _checksum(truth: GroundTruth) -> int:
    question = repr((truth.removed, truth.queries, truth.seeds, truth.baseline_seeds)).encode()
    values = (part.double().cpu().contiguous().numpy().tobytes() for part in (truth.measurements, truth.baseline))
    return zlib.crc32(b"".join([question, *values]))


def _score(found: dict[str, Tensor], replicates: Replicates | None) -> Score:
    def known(value: Tensor) -> float | None:
        return None if math.isnan(value) else float(value)

    return Score(
        score=float(found["score"]),
        low=float(found["low"]),
        high=float(found["high"]),
        ceiling=known(found["ceiling"]),
        reliability=known(found["reliability"]),
        per_query=tuple(known(each) for each in found["per_query"]),
        constant_predictions=int(found["constant_predictions"]),
        replicates=replicates,
    )


def _short(value: Any, most: int = 60) -> str:
    text = str(value)
    return text if len(text) <= most else f"{text[:most]} ..."
