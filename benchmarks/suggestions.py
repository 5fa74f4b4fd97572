"""What do suggested removals really do? Verdicts on digits, held against retraining with fresh seeds.

    python -m benchmarks.suggestions --output suggestions

Records the classifier of digits of ``large_removals``, and asks for up to ten removals for each goal, for the loss on
20 images. Then trains fresh seeds without the suggested removals, without all of those tried, and on everything
("drop"). Prints each verdict, and the predicted effect beside the real one with their intervals: two minutes on one
core. Another call continues.
"""

import argparse
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch.utils.data import Subset

from benchmarks.large_removals import Classifier, Digits
from lightning_dtda import (
    Ensemble,
    InfluenceFunctions,
    TrajectoryRecorder,
    UnrolledDifferentiation,
    attribute,
    record,
    retrain,
    suggest_removals,
)
from lightning_dtda.attribution.suggesting import GOALS, Suggestion, effect_text
from lightning_dtda.estimators import Estimator
from lightning_dtda.evaluation import Verification, verify

STEPS, QUERIES = 200, 20
ESTIMATORS = {
    "default": UnrolledDifferentiation(),
    "exact derivative": UnrolledDifferentiation(horizon=None),
    "influence functions": InfluenceFunctions(),
}


@dataclass(frozen=True)
class Case:
    """A suggestion, and what each of some numbers of removals really does."""

    estimator: str
    caution: float
    suggestion: Suggestion
    real: dict[int, Verification]


def trainer(**settings) -> pl.Trainer:
    """Return a Trainer that only trains."""
    return pl.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        **settings,
    )


def cases(
    output: Path, runs: int, seeds: int, estimators: dict[str, Estimator], cautions: tuple[float, ...]
) -> Iterator[Case]:
    """Yield every suggestion with its verification."""
    recorder = TrajectoryRecorder(output / "runs")
    record(lambda: (trainer(), Classifier(), Digits()), recorder, runs, stacked=True, progress=False)
    data = Digits()
    data.setup("fit")
    asked = {"queries": Subset(data.validation, range(QUERIES)), "progress": False}
    made = []
    for name, estimator in estimators.items():
        asked_of = (Ensemble.open(output / "runs"), Classifier(), data)
        attribution = attribute(*asked_of, **asked, estimator=estimator, output=output / name)
        made += [(name, c, suggest_removals(attribution, goal, caution=c)) for goal in GOALS for c in cautions]
    sizes = [{each.best, len(each.removals)} - {0} for _, _, each in made]
    sets = {tuple(sorted(each.sets[k - 1])) for (_, _, each), of in zip(made, sizes, strict=True) for k in of}
    fresh = range(1000, 1000 + seeds)
    truth = retrain(
        Classifier, data, trainer=trainer, subsets=sorted(sets), seeds=fresh, **asked, output=output / "truth"
    )
    for (name, caution, suggestion), of in zip(made, sizes, strict=True):
        yield Case(name, caution, suggestion, {k: verify(suggestion, truth, step=k) for k in sorted(of)})


def main() -> None:
    """Print all cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path, help="a directory for runs, attributions and truth")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for case in cases(options.output, runs=20, seeds=400, estimators=ESTIMATORS, cautions=(1.0, 0.0)):
        print(f"{case.estimator}, {case.suggestion.goal}, caution {case.caution:g}: {case.suggestion.verdict}")
        for k, real in case.real.items():
            effect = effect_text(case.suggestion.goal, real.effect, real.low, real.high)
            print(f"    {k} removals: predicted {case.suggestion.effect(k)}, real {effect} of {real.before:.3g}")


if __name__ == "__main__":
    main()
