"""Which training sentences move a fine-tuned classifier? Shown, confirmed by retraining, and wrong labels found.

    python -m examples.finetuning.finetuning --runs examples/finetuning/runs --output finetuning

Everything is kept in the output directory; another call continues where the first one stopped.
"""

import argparse
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import torch
from cleanlab.rank import get_label_quality_scores
from datasets import concatenate_datasets
from lightning.pytorch import Trainer
from plotly.subplots import make_subplots

from examples.finetuning.reviews import Classifier, Reviews
from examples.finetuning.scores import confirm, holm, interval, precision
from lightning_dtda import Attribution, Ensemble, GroundTruth, InfluenceFunctions, attribute, report, retrain
from lightning_dtda.attribution import Shown
from lightning_dtda.estimators import Estimator, TracIn

VALIDATION, ASKED, REMOVED, FOLDS = 60, 1, 10, 5
FIRST_SEED = 1000
"""Of fresh trainings, which share no noise with recorded runs."""


def show(row: dict) -> Shown:
    """Show a sentence as people read it, with what twenty of them thought."""
    rating = f"{row['rating']:+.1f} ± {row['deviation']:.1f}"
    return Shown(text=row["text"], label=Reviews.classes[row["label"]], fields=(("rating of 20 people", rating),))


def estimate(ensemble: Ensemble, module: Classifier, data: Reviews, estimator: Estimator, output: Path) -> Attribution:
    """Attribute the loss on validation sentences, and on all training sentences: their self-influence."""
    queries = concatenate_datasets([data.validation.select(range(VALIDATION)), data.train])
    return attribute(ensemble, module, data, queries=queries, estimator=estimator, output=output, show=show)


def split(attribution: Attribution, data: Reviews) -> tuple[Attribution, np.ndarray, np.ndarray]:
    """Return the validation queries, and of the training sentences self-influence and loss, both ``(runs, N)``."""
    first = len(attribution.queries) - len(data.train)
    own = attribution.responses[:, first:].double().diagonal(dim1=1, dim2=2)
    return attribution.select(range(first)), own.numpy(), attribution.baseline[:, first:].double().numpy()


def make_trainer(epochs: int, accelerator: str, **settings) -> Trainer:
    """Return a Trainer that only trains, as config.yaml has it."""
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return Trainer(max_epochs=epochs, accelerator=accelerator, limit_val_batches=0, **quiet, **settings)


def out_of_sample(truth: GroundTruth, folds: list[list[int]], labels: list[int]) -> np.ndarray:
    """Return cleanlab's suspicion of each training sentence, by models trained without its fold, ``(seeds, N)``."""
    margins = torch.full((len(truth.seeds), len(labels)), torch.nan, dtype=torch.float64)
    for fold in folds:
        margins[:, fold] = truth.measurements[truth.removed.index(tuple(fold))][:, fold].double()
    given, labels = torch.sigmoid(margins).numpy(), np.array(labels)
    positive = np.where(labels == 1, given, 1 - given)
    return 1 - np.stack([get_label_quality_scores(labels, np.stack([1 - row, row], 1)) for row in positive])


def figure(rows: list[dict], names: list[str], found: dict[str, dict]) -> go.Figure:
    """Draw what retraining showed for each query, and how well wrong labels are found."""
    titles = (
        "without 10 sentences: change of the loss on a query",
        "finding the wrong labels among the training sentences",
    )
    plot = make_subplots(1, 2, subplot_titles=titles, column_widths=[0.56, 0.44], horizontal_spacing=0.24)
    for key, name, colour in (("random", "10 random ones", "#999999"), ("chosen", "10 by influence", "#0072b2")):
        shift = 0.12 if key == "chosen" else -0.12
        where = [query + shift for query in range(len(rows))]
        x, y = np.concatenate([row[key] for row in rows]), np.repeat(where, [len(row[key]) for row in rows])
        dots = {"color": colour, "size": 6, "opacity": 0.45}
        plot.add_scatter(x=x, y=y, mode="markers", marker=dots, name=f"{name}: one seed", row=1, col=1)
        middle = [interval(row[key]) for row in rows]
        error = {"array": [high - mean for mean, _, high, _ in middle], "thickness": 2}
        dots = {"color": colour, "size": 11, "line": {"color": "black", "width": 1}}
        x = [mean for mean, *_ in middle]
        plot.add_scatter(x=x, y=where, error_x=error, mode="markers", marker=dots, name=f"{name}: mean", row=1, col=1)
    cross = {"symbol": "x-thin", "size": 11, "line": {"width": 2, "color": "#d55e00"}}
    x, y = [row["predicted"] for row in rows], [query + 0.3 for query in range(len(rows))]
    plot.add_scatter(x=x, y=y, mode="markers", marker=cross, name="predicted", row=1, col=1)
    scores = list(found.values())[::-1]
    error = {
        "array": [each["high"] - each["score"] for each in scores],
        "arrayminus": [each["score"] - each["low"] for each in scores],
    }
    x, y, dots = [each["score"] for each in scores], list(found)[::-1], {"color": "#0072b2", "size": 10}
    plot.add_scatter(x=x, y=y, error_x=error, mode="markers", marker=dots, showlegend=False, row=1, col=2)
    plot.update_xaxes(title_text="change of the loss (nats)", zerolinecolor="black", row=1, col=1)
    plot.update_xaxes(title_text="average precision, with 95 % interval", range=[0, 1], row=1, col=2)
    plot.update_yaxes(tickvals=list(range(len(rows))), ticktext=names, zeroline=False, row=1, col=1)
    legend = {"orientation": "h", "y": -0.2}
    return plot.update_layout(template="plotly_white", width=1200, height=480, legend=legend, margin={"t": 50, "r": 20})


def study(ensemble: Ensemble, module: Classifier, data: Reviews, trainer: Callable, seeds: int, output: Path) -> dict:
    """Attribute, retrain and compare; return rows of queries, average precisions, and sentences by influence."""
    data.setup("fit")
    attribution = estimate(ensemble, module, data, InfluenceFunctions(), output / "influence")
    of_queries, own, loss = split(attribution, data)
    report(of_queries, output / "report.html")
    # the queries on which the seed matters most, and the sentences whose removal is predicted to harm them most
    asked = of_queries.baseline.std(0).argsort(descending=True)[:ASKED].tolist()
    mean, generator = of_queries.influence("mean"), torch.Generator().manual_seed(0)
    removals = [
        tuple(tuple(sorted(found[:REMOVED].tolist())) for found in (mean[query].argsort(descending=True), random))
        for query in asked
        for random in [torch.randperm(len(data.train), generator=generator)]
    ]
    settings = {"trainer": trainer, "stacked": False, "ensemble": ensemble}
    fresh = range(FIRST_SEED, FIRST_SEED + seeds)
    subsets = [each for pair in removals for each in pair]
    queries = data.validation.select(asked)
    module_like = partial(Classifier, **module.hparams)
    truth = retrain(
        module_like, data, subsets=subsets, seeds=fresh, queries=queries, output=output / "truth", **settings
    )
    predicted = [
        float(of_queries.influence("mean", removed=pair[0])[q]) for pair, q in zip(removals, asked, strict=True)
    ]
    folds = [sorted(fold.tolist()) for fold in torch.randperm(len(data.train), generator=generator).chunk(FOLDS)]
    held_out = retrain(
        module_like,
        data,
        subsets=folds,
        seeds=fresh[:1],
        queries=data.train,
        measurement="margin",
        output=output / "folds",
        **settings,
    )
    traced, traced_own, _ = split(estimate(ensemble, module, data, TracIn(checkpoints=1), output / "TracIn"), data)
    suspicions = {
        "self-influence": own,
        "influence on validation": -of_queries.responses[:].double().mean(1).numpy(),
        "TracIn, self": traced_own,
        "TracIn, validation": -traced.responses[:].double().mean(1).numpy(),
        "loss of the sentence": loss,
        "cleanlab": out_of_sample(held_out, folds, data.train["label"]),
    }
    return {
        "asked": asked,
        "removals": removals,
        "suspicions": suspicions,
        "rows": confirm(truth, removals, predicted),
        "precision": precision(suspicions, data.wrong.numpy()),
        "sentences": {query: mean[query].argsort(descending=True).tolist() for query in asked},
        "attribution": of_queries,
    }


def main() -> None:
    """Write the report, the figure and the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", required=True, help="Ensemble recorded with config.yaml.")
    parser.add_argument("--output", type=Path, default=Path("finetuning"))
    parser.add_argument("--epochs", type=int, default=2, help="As in config.yaml.")
    parser.add_argument("--seeds", type=int, default=8, help="Number of fresh trainings without each set.")
    parser.add_argument("--accelerator", default="cpu", help="That of the recorded runs.")
    options = parser.parse_args()
    data, trainer = Reviews(), partial(make_trainer, options.epochs, options.accelerator)
    found = study(Ensemble.open(options.runs), Classifier(), data, trainer, options.seeds, options.output)
    attribution, texts = found["attribution"], data.train["text"]
    mean, error = attribution.influence("mean"), attribution.standard_error("mean")
    for query, row in zip(found["asked"], found["rows"], strict=True):
        print(f"\n{show(data.validation[query])}")
        for k in (*found["sentences"][query][:3], *found["sentences"][query][-3:]):
            wrong = " (wrong label)" if data.wrong[k] else ""
            print(f"  {mean[query, k]:+.3f} ± {error[query, k]:.3f} {show(data.train[k]).label}{wrong}: {texts[k]}")
        print(
            "  predicted {:+.3f}; real {:+.3f} [{:+.3f}, {:+.3f}]; random {:+.3f} [{:+.3f}, {:+.3f}]".format(
                row["predicted"], *interval(row["chosen"])[:3], *interval(row["random"])[:3]
            )
        )
        print("  difference {:+.3f} [{:+.3f}, {:+.3f}], p {:.2g}".format(*row["paired"]), f"Holm {row['holm']:.2g}")
    adjusted = holm([each["p"] for each in found["precision"].values()][1:])
    for (name, each), p in zip(found["precision"].items(), [1.0, *adjusted], strict=True):
        less = "{:+.3f} [{:+.3f}, {:+.3f}]".format(each["score"] - each["first"], *each["less"])
        print(
            f"{name}: {each['score']:.3f} [{each['low']:.3f}, {each['high']:.3f}], less the first {less}, Holm {p:.2g}"
        )
    names = [textwrap.fill(data.validation[query]["text"], 32).replace("\n", "<br>") for query in found["asked"]]
    drawn = figure(found["rows"], names, found["precision"])
    drawn.write_html(options.output / "finetuning.html", config={"displayModeBar": False})


if __name__ == "__main__":
    main()
