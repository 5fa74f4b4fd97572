"""Which training sentences move a fine-tuned classifier? Shown, confirmed by retraining, and wrong labels found.

    python -m examples.finetuning.finetuning --runs examples/finetuning/runs --output finetuning

Everything is kept in the output directory; another call continues where the first one stopped.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from cleanlab.rank import get_label_quality_scores
from datasets import Dataset, concatenate_datasets
from lightning.pytorch import Trainer

from examples.finetuning.presentation import figure, print_scores, print_sentences
from examples.finetuning.reviews import Classifier, Reviews
from examples.finetuning.scores import confirm, precision, sizes
from lightning_dtda import (
    Attribution,
    Ensemble,
    GroundTruth,
    InfluenceFunctions,
    UnrolledDifferentiation,
    attribute,
    report,
    retrain,
)
from lightning_dtda.attribution import Shown
from lightning_dtda.estimators import Estimator, TracIn

VALIDATION, REMOVED, FOLDS = 60, 10, 5
FIRST_SEED = 1000
"""Of fresh trainings, which share no noise with recorded runs."""
UNROLLED = {"unrolled": UnrolledDifferentiation(), "exact": UnrolledDifferentiation(horizon=None)}
"""Their cost grows with the number of queries, so they are asked about the chosen ones only."""


def show(row: dict) -> Shown:
    """Show a sentence as people read it, with what twenty of them thought."""
    rating = f"{row['rating']:+.1f} ± {row['deviation']:.1f}"
    return Shown(text=row["text"], label=Reviews.classes[row["label"]], fields=(("rating of 20 people", rating),))


def make_trainer(epochs: int, accelerator: str, **settings) -> Trainer:
    """Return a Trainer that only trains, as config.yaml has it."""
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return Trainer(max_epochs=epochs, accelerator=accelerator, limit_val_batches=0, **quiet, **settings)


@dataclass(frozen=True)
class Study:
    """What every step needs. Each step keeps its result in a directory of its own."""

    ensemble: Ensemble
    module: Classifier
    data: Reviews
    trainer: Callable[[], Trainer]
    output: Path

    def attribute(self, estimator: Estimator, queries: Dataset, name: str) -> Attribution:
        """Attribute the loss on sentences."""
        output = self.output / name
        return attribute(
            self.ensemble, self.module, self.data, queries=queries, estimator=estimator, output=output, show=show
        )

    def attribute_all(self, estimator: Estimator, name: str) -> tuple[Attribution, np.ndarray, np.ndarray]:
        """Attribute the loss on validation and training sentences.

        Returns:
            The attribution of the validation sentences; of training sentences self-influence and loss, ``(runs, N)``.
        """
        first = min(VALIDATION, len(self.data.validation))
        queries = concatenate_datasets([self.data.validation.select(range(first)), self.data.train])
        found = self.attribute(estimator, queries, name)
        own = found.responses[:, first:].double().diagonal(dim1=1, dim2=2)
        return found.select(range(first)), own.numpy(), found.baseline[:, first:].double().numpy()

    def retrain(self, subsets: Sequence, seeds: int, queries: Dataset, name: str, measurement="loss") -> GroundTruth:
        """Train without sets of sentences, on fresh seeds."""
        return retrain(
            partial(Classifier, **self.module.hparams),
            self.data,
            subsets=subsets,
            seeds=range(FIRST_SEED, FIRST_SEED + seeds),
            queries=queries,
            measurement=measurement,
            output=self.output / name,
            trainer=self.trainer,
            stacked=False,
            ensemble=self.ensemble,
        )

    def out_of_sample(self) -> np.ndarray:
        """Return cleanlab's suspicion of each training sentence, by models trained without its fold, ``(1, N)``."""
        labels = np.array(self.data.train["label"])
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
        folds = [tuple(sorted(fold.tolist())) for fold in order.chunk(FOLDS)]
        truth = self.retrain(folds, 1, self.data.train, "folds", measurement="margin")
        given = np.empty(len(labels))
        for fold in folds:
            of_fold = truth.measurements[truth.removed.index(fold), 0, list(fold)]
            given[list(fold)] = torch.sigmoid(of_fold.double()).numpy()
        positive = np.where(labels == 1, given, 1 - given)
        return 1 - get_label_quality_scores(labels, np.stack([1 - positive, positive], 1))[None]


def choose(attribution: Attribution, queries: int) -> tuple[list[int], list[tuple[tuple, tuple]]]:
    """Choose the queries whose loss depends most on the seed, and what is removed for each.

    Returns:
        The queries; and for each the sentences whose removal is predicted to raise its loss most, and random ones.
    """
    asked = attribution.baseline.std(0).argsort(descending=True)[:queries].tolist()
    mean, generator = attribution.influence("mean")[asked], torch.Generator().manual_seed(0)
    chosen = mean.argsort(1, descending=True)
    random = [torch.randperm(mean.shape[1], generator=generator) for _ in asked]
    return asked, [
        tuple(tuple(sorted(order[:REMOVED].tolist())) for order in pair) for pair in zip(chosen, random, strict=True)
    ]


def run(study: Study, queries: int, seeds: int) -> dict:
    """Attribute, retrain and compare; return what is printed and drawn."""
    data = study.data
    data.setup("fit")
    influence, own, loss = study.attribute_all(InfluenceFunctions(), "influence")
    traced, traced_own, _ = study.attribute_all(TracIn(checkpoints=2), "tracin")

    asked, removals = choose(influence, queries)
    sentences = data.validation.select(asked)
    truth = study.retrain([each for pair in removals for each in pair], seeds, sentences, "truth")
    unrolled = {name: study.attribute(each, sentences, name) for name, each in UNROLLED.items()}
    report(unrolled["exact"], study.output / "report.html")
    # the same sentences, but numbered as the truth numbers them
    same = {"queries": truth.queries, "about": influence.about | {"queries_fingerprint": None}}
    attributions = {
        "influence": replace(influence.select(asked), **same),
        **unrolled,
        "TracIn": replace(traced.select(asked), **same),
    }
    suspicions = {
        "self-influence": own,
        "influence on validation": -influence.responses[:].double().mean(1).numpy(),
        "TracIn, self-influence": traced_own,
        "TracIn, on validation": -traced.responses[:].double().mean(1).numpy(),
        "loss of the sentence": loss,
        "cleanlab": study.out_of_sample(),
    }
    return {
        "asked": asked,
        "removals": removals,
        "suspicions": suspicions,
        "rows": confirm(truth, removals),
        "sizes": sizes(truth, removals, attributions),
        "precision": precision(suspicions, data.wrong.numpy()),
        "attributions": attributions,
    }


def main() -> None:
    """Write the report, the figure and the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", required=True, help="Ensemble recorded with config.yaml.")
    parser.add_argument("--output", type=Path, default=Path("finetuning"))
    parser.add_argument("--epochs", type=int, default=2, help="As in config.yaml.")
    parser.add_argument("--queries", type=int, default=5, help="Number of validation sentences to confirm.")
    parser.add_argument("--seeds", type=int, default=10, help="Number of fresh trainings without each set.")
    parser.add_argument("--accelerator", default="cpu", help="That of the recorded runs.")
    options = parser.parse_args()
    trainer = partial(make_trainer, options.epochs, options.accelerator)
    study = Study(Ensemble.open(options.runs), Classifier(), Reviews(), trainer, options.output)
    found = run(study, options.queries, options.seeds)
    print_sentences(found["asked"], found["attributions"], study.data)
    texts = [study.data.validation[query]["text"] for query in found["asked"]]
    results = found["rows"], texts, found["sizes"], found["precision"]
    print_scores(*results)
    figure(*results).write_html(options.output / "finetuning.html", config={"displayModeBar": False})


if __name__ == "__main__":
    main()
