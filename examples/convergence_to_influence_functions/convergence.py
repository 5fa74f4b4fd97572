"""Unrolled differentiation converges to influence functions as training goes on, more closely with smaller steps.

Theorem 2 of Mlodozeniec et al. (arXiv 2506.12965), on UCI Concrete: trainings with large, medium and small steps, of
equal training time (the sum of the learning rates).

    python -m examples.convergence_to_influence_functions.convergence --data concrete.txt --output convergence
"""

import argparse
import csv
import logging
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots
from torch.utils.data import Subset

from examples.concrete.concrete import ConcreteData, ConcreteRegressor
from lightning_dtda import Ensemble, InfluenceFunctions, Run, TrajectoryRecorder, UnrolledDifferentiation, attribute
from lightning_dtda.estimators import GaussNewton
from lightning_dtda.estimators.null_space import range_share

TIME = 37.5
"""Sum of the learning rates of each training."""

RATES = (0.05, 0.02, 0.01)

DAMPINGS = (0.01, 0.03, 0.1, 0.3)
MOMENTS = (0.1, 0.25, 0.5, 1.0)
"""Points at which to compare, as shares of the steps. Unrolling costs one backward step per step before the point."""

COLOURS = ("#d62728", "#ff7f0e", "#1f77b4")


class ConstantRate(ConcreteRegressor):
    """The same network without a schedule."""

    def configure_optimizers(self):
        """Return SGD with a constant learning rate."""
        return torch.optim.SGD(self.parameters(), lr=self.hparams.learning_rate)


# module, and mean learning rate over a training as a share of the first
SCHEDULES = {"cosine": (ConcreteRegressor, 0.5), "constant": (ConstantRate, 1.0)}


def record(root, data, module, steps, seeds):
    """Record the missing runs."""
    for seed in range(seeds):
        path = root / f"seed-{seed:04d}"
        if (path / "manifest.json").exists() and Run(path).complete:
            continue
        pl.seed_everything(seed, verbose=False)
        trainer = pl.Trainer(
            max_steps=steps,
            max_epochs=-1,
            callbacks=[TrajectoryRecorder(root, overwrite=True)],
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
        )
        trainer.fit(module(), data)
    return Ensemble.open(root)[:seeds]


def correlation(a, b):
    """Return Pearson's correlation over queries and examples."""
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]).double())[0, 1].item()


def compare(ensemble, data, queries, step, output):
    """Yield a row for each damping: correlations of influence functions with unrolled differentiation at a step."""

    def responses(estimator, name):
        return attribute(
            ensemble,
            ConcreteRegressor(),
            data,
            queries=queries,
            measurement="prediction",
            estimator=estimator,
            step=step,
            output=output / f"{name}-{step}",
            progress=False,
        ).responses

    unrolled = responses(UnrolledDifferentiation(horizon=None), "unrolled")
    time = sum(float(ensemble[0].learning_rates(t)) for t in range(step))
    shares = [
        range_share(run, ConcreteRegressor(), data, queries, "prediction", GaussNewton(), step) for run in ensemble
    ]
    for damping in DAMPINGS:
        influence = responses(InfluenceFunctions(GaussNewton(damping=damping)), f"influence-{damping:g}")
        of_runs = [correlation(u, i) for u, i in zip(unrolled, influence, strict=True)]
        yield {
            "step": step,
            "training time": time,
            "damping": damping,
            "seed averages": correlation(unrolled.mean(0), influence.mean(0)),
            "single runs": sum(of_runs) / len(of_runs),
            "range share": torch.stack(shares).mean().item(),
        }


def draw(rows):
    """Draw the correlations at the best damping for each learning rate and point in time, and the range share."""
    titles = ("seed averages", "single runs", "range share of the measurement's gradient")
    figure = make_subplots(1, 3, subplot_titles=titles)
    for rate, colour in zip(RATES, COLOURS, strict=True):
        if not any(row["learning rate"] == rate for row in rows):
            continue  # not measured yet
        for column, name in enumerate(("seed averages", "single runs", "range share"), 1):
            best = {}
            for row in rows:
                if row["learning rate"] == rate:
                    best[row["training time"]] = max(best.get(row["training time"], -1.0), row[name])
            figure.add_scatter(
                x=list(best),
                y=list(best.values()),
                name=f"learning rate {rate:g}",
                legendgroup=f"{rate:g}",
                showlegend=column == 1,
                mode="lines+markers",
                line_color=colour,
                row=1,
                col=column,
            )
    figure.update_yaxes(range=[0.9, 1], col=3)
    figure.update_xaxes(title_text="training time (sum of learning rates)")
    figure.update_yaxes(title_text="Pearson correlation, best damping", col=1)
    title = "Unrolled differentiation and influence functions come together as training goes on"
    return figure.update_layout(title=title, template="plotly_white", width=1150, height=440)


def write(rows, output):
    """Write the table and the figure, and print the table."""
    with (output / "convergence.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    figure: go.Figure = draw(rows)
    figure.write_html(output / "convergence.html", config={"displayModeBar": False})
    print("  ".join(rows[0]))
    for row in rows:
        print("  ".join(f"{value:>{len(name)}.4g}" for name, value in row.items()), flush=True)


def main():
    """Record, attribute, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="the table as text: 1,030 rows, nine columns")
    parser.add_argument("--output", type=Path, default=Path("convergence"))
    parser.add_argument("--schedule", choices=SCHEDULES, default="cosine", help="schedule of the learning rate")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--queries", type=int, default=10)
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)

    data = ConcreteData(options.data)
    data.setup("fit")
    queries = Subset(data.validation, range(options.queries))
    rows = []
    make, share = SCHEDULES[options.schedule]
    for rate in RATES:
        steps, output = round(TIME / (share * rate)), options.output / f"{rate:g}"
        ensemble = record(output / "runs", data, partial(make, learning_rate=rate), steps, options.seeds)
        for moment in MOMENTS:
            for row in compare(ensemble, data, queries, round(moment * steps), output):
                rows.append({"learning rate": rate, **row})
        write(rows, options.output)


if __name__ == "__main__":
    main()
