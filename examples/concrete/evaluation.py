"""Predictions against thousands of retrainings: which estimators order removals like retraining, with what certainty?

    python -m examples.concrete.evaluation --data concrete.txt --output evaluation

The regression task of the paper. For each of 40 random tenths of the training rows, 192 seeds are trained without it,
and 256 seeds are trained on everything ("drop": the rows are deleted, seeds and orders are new). Each estimator
predicts these retrainings from 20 and from 64 recorded runs. Writes ``scores.json`` and ``scores.html``, and prints the
scores and whether recorded runs predict retraining better than half of the retrainings do.

Another call continues where the first one stopped. The retrainings take about twenty minutes on one core.
"""

import argparse
import json
import logging
from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots
from torch import Tensor
from torch.utils.data import Subset

from examples.concrete.concrete import ConcreteData, ConcreteRegressor
from lightning_dtda import (
    Attribution,
    Ensemble,
    GroundTruth,
    InfluenceFunctions,
    Run,
    TrajectoryRecorder,
    UnrolledDifferentiation,
    attribute,
    retrain,
)
from lightning_dtda.estimators import EKFAC, TRAK, Estimator, GaussNewton, Source, TracIn
from lightning_dtda.evaluation import Evaluation, evaluate
from lightning_dtda.reporting.evaluations import print_evaluations
from lightning_dtda.retraining import random_subsets
from lightning_dtda.statistics.correlation import correlations
from lightning_dtda.statistics.differences import PAPERS, resolve_difference

STEPS, QUERIES = 1500, 20
RUNS = (20, 64)
SUBSETS, KEPT, SEEDS, BASELINE_SEEDS = 40, 0.9, 192, 256

ESTIMATORS: dict[str, Callable[[], Estimator]] = {
    "unrolled": lambda: UnrolledDifferentiation(horizon=None),
    "horizon": UnrolledDifferentiation,
    "Source": Source,
    "Gauss-Newton, damping 0.01": lambda: InfluenceFunctions(GaussNewton(damping=0.01)),
    "Gauss-Newton, damping 0.03": lambda: InfluenceFunctions(GaussNewton(damping=0.03)),
    "Gauss-Newton, damping 0.1": lambda: InfluenceFunctions(GaussNewton(damping=0.1)),
    "EK-FAC": lambda: InfluenceFunctions(EKFAC()),
    "TRAK": TRAK,
    "TracIn": TracIn,
}
COLOURS = ("#9ecae1", "#08519c")


def make_trainer(**settings) -> pl.Trainer:
    """Create a Trainer that only trains."""
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


def record(data: ConcreteData, root: Path, runs: int) -> Ensemble:
    """Record the missing runs, with seeds starting from 0."""
    for seed in range(runs):
        path = root / f"seed-{seed:04d}"
        if not (path / "manifest.json").exists() or not Run(path).complete:
            pl.seed_everything(seed, verbose=False)
            make_trainer(callbacks=[TrajectoryRecorder(root, overwrite=True)]).fit(ConcreteRegressor(), data)
    return Ensemble.open(root)


def answer(ensemble: Ensemble, data: ConcreteData, estimator: Estimator | None, output: Path) -> Attribution:
    """Attribute the predictions on the first validation rows; without an estimator, return random responses."""
    if estimator is None:
        known = Attribution.load(output)
        generator = torch.Generator().manual_seed(0)
        return Attribution(
            known.baseline,
            torch.randn(known.responses.shape, generator=generator) * known.responses.std(),
            known.runs,
            known.queries,
            known.about,
        )
    return attribute(
        ensemble,
        ConcreteRegressor(),
        data,
        queries=Subset(data.validation, range(QUERIES)),
        measurement="prediction",
        estimator=estimator,
        output=output,
    )


def against_retraining(attribution: Attribution, truth: GroundTruth, difference: str) -> tuple[float, float, float]:
    """Compare recorded runs with half of the retrainings as predictors of the other half.

    Returns:
        The score of the runs minus that of half of the retrainings, and the limits of its 95 % interval. Removals,
        queries and runs are resampled, and the retrainings are halved again; the deviations of these differences from
        their mean are taken for the deviation of the difference from its expectation.
    """
    generator = torch.Generator().manual_seed(0)
    taken = resolve_difference(difference)
    baseline, real = truth.baseline.double()[..., None], truth.measurements.double().permute(1, 2, 0)
    own = attribution.baseline.double()[..., None]
    changed = torch.stack([attribution.predict(list(subset)).double() for subset in truth.removed], -1)

    def draw(number: int) -> Tensor:
        return torch.randint(number, (number,), generator=generator)

    def gain(again: bool) -> Tensor:
        half, other = torch.randperm(len(real), generator=generator).chunk(2)
        of_all, of_others = torch.randperm(len(baseline), generator=generator).chunk(2)
        runs = draw(len(own)) if again else slice(None)
        influences = (
            taken(own[runs], changed[runs]),
            taken(baseline[of_all], real[half]),
            taken(baseline[of_others], real[other]),
        )
        if again:
            rows, columns = draw(len(own[0]))[:, None], draw(changed.shape[-1])
            influences = tuple(influence[rows, columns] for influence in influences)
        predicted, retrained, target = influences
        return (correlations(predicted, target) - correlations(retrained, target)).mean()

    estimate = torch.stack([gain(again=False) for _ in range(50)]).mean()
    replicates = torch.stack([gain(again=True) for _ in range(500)])
    below, above = (replicates - replicates.mean()).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return float(estimate), float(estimate - above), float(estimate - below)


def draw(evaluations: dict[str, dict[int, Evaluation]]) -> go.Figure:
    """Draw the scores with their intervals, one panel per difference, and the noise ceiling as a line."""
    names = list(evaluations)[::-1]
    differences = PAPERS
    figure = make_subplots(1, 3, subplot_titles=differences, shared_yaxes=True, horizontal_spacing=0.03)
    for column, difference in enumerate(differences, 1):
        for runs, colour in zip(RUNS, COLOURS, strict=True):
            scores = [evaluations[name][runs].scores[difference] for name in names]
            figure.add_scatter(
                x=[score.score for score in scores],
                y=names,
                error_x={
                    "array": [score.high - score.score for score in scores],
                    "arrayminus": [score.score - score.low for score in scores],
                },
                mode="markers",
                marker={"color": colour, "size": 9},
                name=f"{runs} recorded runs",
                legendgroup=str(runs),
                showlegend=column == 1,
                row=1,
                col=column,
            )
        ceiling = scores[0].ceiling
        if ceiling is not None:
            where = {"annotation_text": "noise ceiling", "annotation_position": "bottom left"}
            figure.add_vline(x=ceiling, line_dash="dot", row=1, col=column, **where)
    figure.update_xaxes(title_text="distributional LDS", range=[-0.2, 1.05])
    title = "Do predictions order removals as retraining does?"
    return figure.update_layout(title=title, template="plotly_white", width=1150, height=480)


def main() -> None:
    """Record, retrain, attribute, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="the table as text")
    parser.add_argument("--output", required=True, type=Path, help="a directory for runs, truth and attributions")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    options.output.mkdir(parents=True, exist_ok=True)
    data = ConcreteData(options.data)
    data.setup("fit")
    ensemble = record(data, options.output / "runs", max(RUNS))
    truth = retrain(
        ConcreteRegressor,
        data,
        trainer=make_trainer,
        subsets=random_subsets(len(data.train), SUBSETS, KEPT),
        # not the recorded seeds, whose noise would be in both truth and prediction
        seeds=range(1000, 1000 + SEEDS),
        baseline_seeds=range(1000, 1000 + BASELINE_SEEDS),
        queries=Subset(data.validation, range(QUERIES)),
        measurement="prediction",
        ensemble=ensemble,
        output=options.output / "truth",
    )
    evaluations: dict[str, dict[int, Evaluation]] = {}
    for name, make in [*ESTIMATORS.items(), ("random", None)]:
        for runs in RUNS:
            path = options.output / "attributions" / f"{'unrolled' if make is None else name}-{runs}"
            attribution = answer(ensemble[:runs], data, None if make is None else make(), path)
            evaluations.setdefault(name, {})[runs] = evaluate(attribution, truth)
            if name == "unrolled":
                for difference in PAPERS:
                    gain, low, high = against_retraining(attribution, truth, difference)
                    print(
                        f"{runs} runs minus {SEEDS // 2} retrainings of each subset, as predictors of the others: "
                        f"{difference} {gain:+.3f} [{low:+.3f}, {high:+.3f}]"
                    )
    for runs in RUNS:
        print_evaluations({name: of_runs[runs] for name, of_runs in evaluations.items()})
    content = {name: {runs: each.content() for runs, each in of_runs.items()} for name, of_runs in evaluations.items()}
    (options.output / "scores.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    draw(evaluations).write_html(options.output / "scores.html", config={"displayModeBar": False})


if __name__ == "__main__":
    main()
