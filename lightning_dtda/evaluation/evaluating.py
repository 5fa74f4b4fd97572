"""An attribution against ground truth: do its predictions agree with retraining?"""

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
from lightning_dtda.errors import AttributionError
from lightning_dtda.evaluation.functional.agreement import REPLICATES, agreement
from lightning_dtda.retraining.ground_truth import GroundTruth
from lightning_dtda.statistics.crossed_bootstrap import Replicates
from lightning_dtda.statistics.differences import DIFFERENCES, PAPERS, Difference, resolve_difference
from lightning_dtda.statistics.samples import arrange, collect

_SEED = re.compile(r"seed-(\d+)$")
"""What runs are called that were recorded after ``seed_everything``."""


@dataclass(frozen=True)
class Score:
    """Linear datamodeling score of one difference.

    See :func:`~lightning_dtda.evaluation.functional.linear_datamodeling_score`.

    Args:
        score: The score.
        low: Lower limit of its interval.
        high: Upper limit.
        ceiling: The best score that the noise of the truth allows; ``None`` with too few seeds to tell.
        reliability: Its square: what an equal truth with other seeds would score.
        per_query: Of each query; ``None`` where its real influence is the same for all subsets.
        constant_predictions: How many queries have a correlation of 0 since all predictions are the same.
        replicates: What the interval is from; ``None`` without one.
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
        """How many queries do not count."""
        return self.per_query.count(None)


@dataclass(frozen=True)
class Evaluation:
    """How well an attribution predicts retraining.

    Args:
        scores: By difference.
        measurement: Its name.
        removal: What removal means in the truth, ``"drop"`` or ``"reweight"``; predictions are of ``"reweight"``.
        runs: Number of recorded runs that were taken.
        left_out: Names of the chaotic ones that were not.
        subsets: Number of removals that were retrained.
        seeds: Number of trainings without each subset.
        baseline_seeds: Number of trainings on everything.
        queries: Number of queries.
        shared_seeds: Seeds that were both recorded and retrained.
        confidence: Of the intervals.
        run_names: The recorded runs that were taken.
        truth_checksum: Of the truth: evaluations that differ in it are of different truths.
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
        """Return it in what JSON can hold."""
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

    The samples that :meth:`~lightning_dtda.Attribution.predict` gives for each of the truth's subsets are compared with
    those of the retrained models (arXiv 2506.12965, section 5). If trainings are missing, the part of the truth is
    taken of which none is.

    Args:
        attribution: What predicts. With groups as removals, each subset must be made up of groups.
        truth: What retraining measured, of the same data, queries and measurement.
        differences: As for :class:`~lightning_dtda.evaluation.LinearDatamodelingScore`; ``None`` takes the
            paper's for which there are enough runs and seeds.
        runs: The ``"trusted"`` ones, without those that the attribution calls chaotic; or ``"all"``.
        replicates: Number of draws for the intervals; 0 leaves them out.
        confidence: Of the intervals.
        seed: Of the draws.

    Returns:
        Scores with interval and noise ceiling, and what they are of.

    Raises:
        AttributionError: If the truth is about something else; if there is nothing to compare; or if there are too few
            runs or seeds for a difference that was asked for.

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
            f"{missing} trainings of the ground truth are missing. {len(truth.removed)} subsets with "
            f"{len(truth.seeds)} seeds are complete and compared.",
            stacklevel=2,
        )
    check_alignment(attribution, truth)
    left_out = attribution.chaotic if runs == "trusted" else ()
    selected = attribution._selected(runs)
    shared = _shared_seeds(selected, truth)
    if shared:
        other = "removal='drop'" if truth.removal == "reweight" else "other seeds"
        warnings.warn(
            f"{len(shared)} seeds were both recorded and retrained ({shared[0]}, ...): truth and prediction share "
            f"noise, so that scores hold for these runs and may exceed the noise ceiling. Retrain with {other} to "
            "learn about the distribution.",
            stacklevel=2,
        )
    samples = collect(
        arrange(predicted_samples(selected, truth), selected.baseline, truth.measurements, truth.baseline),
        paired=truth.seeds == truth.baseline_seeds,
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
    """Refuse a ground truth that is about something else.

    What neither says, as of one that was made by hand, is not compared.

    Raises:
        AttributionError: Naming what differs.
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
                "Attribute or retrain with those of the other."
            )
    if attribution.step is not None:
        raise AttributionError(
            f"The attribution is of the models after step {attribution.step}, the ground truth of trained ones. "
            "Attribute again without step."
        )


def predicted_samples(attribution: Attribution, truth: GroundTruth) -> Tensor:
    """Return the samples that are predicted without each of the truth's subsets ``(subsets, runs, queries)``, float64.

    Raises:
        AttributionError: If the attribution does not know the removal of a subset.
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
    """Return the positions of the groups that a subset is made up of, the largest first."""
    left, found = set(subset), []
    for position in sorted(range(len(members)), key=lambda group: -len(members[group])):
        if members[position] and left.issuperset(members[position]):
            left -= set(members[position])
            found.append(position)
    if left:
        raise AttributionError(
            f"Subset {number} of the ground truth removes training example {min(left)}, which is in no group of the "
            "attribution that the subset has whole. Attribute every example (removals='leave-one-out'), or retrain "
            "without groups."
        )
    return found


def _shared_seeds(attribution: Attribution, truth: GroundTruth) -> tuple[int, ...]:
    recorded = {int(match[1]) for run in attribution.runs if (match := _SEED.search(run))}
    return tuple(sorted(recorded & {*truth.seeds, *truth.baseline_seeds}))


def _checksum(truth: GroundTruth) -> int:
    told = repr((truth.removed, truth.queries, truth.seeds, truth.baseline_seeds)).encode()
    values = (part.double().cpu().contiguous().numpy().tobytes() for part in (truth.measurements, truth.baseline))
    return zlib.crc32(b"".join([told, *values]))


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
