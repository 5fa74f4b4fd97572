"""Which estimator predicts exact replays of the recorded runs best? A ranking that needs no new seeds."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from lightning.pytorch import LightningModule

from lightning_dtda.attribution.attributing import attribute
from lightning_dtda.estimators import Estimator
from lightning_dtda.estimators.estimator import labels
from lightning_dtda.evaluation.comparing import Comparison, compare
from lightning_dtda.evaluation.evaluating import Evaluation, evaluate
from lightning_dtda.retraining import random_subsets, retrain
from lightning_dtda.trajectory import Ensemble

_RUNS = 8
"""Maximum number of runs that are replayed: their mean has a third of the noise of a single run."""

_KEPT = 0.9
"""Share of the examples that every replay keeps, as in the evaluations of the documentation."""

_DIFFERENCE = "mean"
"""Difference to rank by: the one that a few runs can measure."""


@dataclass(frozen=True)
class Ranking:
    """How well estimators predict exact replays of the recorded runs without random sets of examples.

    Args:
        evaluations: Evaluation of each estimator by its name, the best score of the mean influence first.
        seconds: Time that each estimator took for these runs and queries.
    """

    evaluations: dict[str, Evaluation]
    seconds: dict[str, float]

    @property
    def behind(self) -> dict[str, Comparison]:
        """How much lower each estimator's score of the mean influence is than the best one, with its interval."""
        best = next(iter(self.evaluations.values()))
        return {name: compare(best, evaluation)[_DIFFERENCE] for name, evaluation in self.evaluations.items()}

    @property
    def chosen(self) -> str:
        """Name of the cheapest estimator of those that these replays cannot tell from the best."""
        return min(self._as_good, key=self.seconds.__getitem__)

    @property
    def advice(self) -> str:
        """A sentence that says which estimator to use."""
        best = next(iter(self.evaluations.values())).scores[_DIFFERENCE]
        if not best.low > 0:
            return (
                "None of these estimators predicts the replays, so no derivative predicts removals of this size. "
                "Remove fewer examples, or retrain."
            )
        if self._as_good == [self.chosen]:
            return f"Use {self.chosen}: it predicts the replays better than the others."
        return f"These replays cannot tell {_listed(self._as_good)} apart. Use {self.chosen}, the cheapest of them."

    @property
    def _as_good(self) -> list[str]:
        return [name for name, behind in self.behind.items() if not behind.clear]


def rank_estimators(
    ensemble: Ensemble, module: LightningModule, data: Any, estimators: Sequence[Estimator], sets: int, **question: Any
) -> Ranking:
    """Attribute a few runs with each estimator, replay them without random tenths of the data, and compare.

    Removed examples get weight zero in the recorded order, so a replay differs from its run by the removal alone.

    Args:
        ensemble: The recorded runs; the first eight are used, without those that are chaotic for one of the estimators.
        module: As for :func:`~lightning_dtda.attribute`.
        data: As for :func:`~lightning_dtda.attribute`.
        estimators: Estimators to compare, at least two.
        sets: Number of random tenths, at least two.
        question: Other arguments of :func:`~lightning_dtda.attribute` and :func:`~lightning_dtda.retrain`.

    Raises:
        RetrainingError: If two runs have the same seed, or a run has none.
    """
    attributions, seconds = {}, {}
    for name, estimator in zip(labels(estimators), estimators, strict=True):
        started = perf_counter()
        attributions[name] = attribute(ensemble[:_RUNS], module, data, estimator=estimator, **question)
        seconds[name] = perf_counter() - started
    chaotic = list(dict.fromkeys(run for attribution in attributions.values() for run in attribution.chaotic))
    left = Ensemble([run for run in ensemble[:_RUNS] if run.name not in chaotic], ensemble.root)
    # a tenth of few examples may be drawn twice
    subsets = list(dict.fromkeys(random_subsets(ensemble.examples, sets, _KEPT)))
    truth = retrain(module, data, subsets=subsets, seeds=len(left), removal="reweight", ensemble=left, **question)
    with warnings.catch_warnings():
        # that runs and replays have the same seeds is the purpose here: estimators are compared on these runs
        warnings.filterwarnings("ignore", message=".*were both recorded and retrained")
        evaluations = {
            name: evaluate(attribution.without_runs(chaotic), truth) for name, attribution in attributions.items()
        }
    order = sorted(evaluations, key=lambda name: -evaluations[name].scores[_DIFFERENCE].score)
    return Ranking({name: evaluations[name] for name in order}, seconds)


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"
