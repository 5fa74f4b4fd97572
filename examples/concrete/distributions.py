"""Do predicted distributions resemble those of retraining? A figure, and counts.

    python -m examples.concrete.distributions --data concrete.txt --output evaluation

For each of 20 queries, the ten training rows that are predicted to change its distribution most are removed together,
and 192 seeds are trained without them. Writes ``distributions.html``: distributions measured on all data, predicted and
retrained, for the queries that change most, and whether the retrained ones are closer to the prediction than to those
measured on all data (paper, figure 2). Prints for how many queries they are closer, also for the random removals of
``examples.concrete.evaluation`` if their truth is in the output directory.

Runs, predictions and trainings are kept in the output directory; another call continues where the first one stopped.
"""

import argparse
import logging
from pathlib import Path
from typing import NamedTuple

import numpy as np
import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots
from scipy.stats import gaussian_kde
from torch import Tensor
from torch.utils.data import Subset

from examples.concrete.concrete import ConcreteData, ConcreteRegressor
from examples.concrete.evaluation import QUERIES, RUNS, SEEDS, answer, make_trainer, record
from lightning_dtda import Attribution, GroundTruth, UnrolledDifferentiation, retrain
from lightning_dtda.retraining import top_removals
from lightning_dtda.statistics.differences import Difference, Mean, Wasserstein

REMOVED, SHOWN = 10, 3
COLOURS = {"all data": "#969696", "predicted": "#e6550d", "retrained": "#08519c"}


class Distances(NamedTuple):
    """Distances of retrained distributions from two others ``(removals, queries)``."""

    from_baseline: Tensor
    from_prediction: Tensor

    @property
    def closer(self) -> Tensor:
        """Where the prediction is the closer one."""
        return self.from_prediction < self.from_baseline


def distances(attribution: Attribution, truth: GroundTruth, difference: Difference) -> Distances:
    """Compare each removal's retrained distribution with the runs' on all data, and with their prediction."""
    baseline = attribution.baseline.double()
    pairs = []
    for removed, real in zip(truth.removed, truth.measurements.double(), strict=True):
        predicted = attribution.predict(list(removed)).double()
        pairs.append((difference(baseline, real).abs(), difference(predicted, real).abs()))
    return Distances(*(torch.stack(each) for each in zip(*pairs, strict=True)))


def print_counts(what: str, attribution: Attribution, truth: GroundTruth, own: bool = False) -> None:
    """Print for how many queries the prediction is closer.

    Args:
        what: Description of the removals.
        attribution: Attribution with the predictions.
        truth: Ground truth from retraining.
        own: Whether removal k was chosen for query k and counts only there.
    """
    for difference in (Mean(), Wasserstein()):
        closer = distances(attribution, truth, difference).closer
        counted = closer.diagonal() if own else closer
        runs = len(attribution.runs)
        print(
            f"{what}, {runs} runs: closer to the prediction in {difference.name}: {counted.sum()} of {counted.numel()}"
        )


def draw(attribution: Attribution, truth: GroundTruth) -> go.Figure:
    """Draw the distributions of the queries that are predicted to change most, and the distances of all queries."""
    deviation = truth.baseline.double().std(0)
    predicted = torch.stack([attribution.predict(list(removed)) for removed in truth.removed])
    of_own = distances(attribution, truth, Wasserstein())
    sizes = torch.stack([Wasserstein()(attribution.baseline[:, q], predicted[q, :, q]) for q in range(len(deviation))])
    chosen = (sizes / deviation).argsort(descending=True)[:SHOWN].tolist()
    titles = [f"query {truth.queries[q]}" for q in chosen] + ["W2 of the retrained, all queries"]
    figure = make_subplots(1, SHOWN + 1, subplot_titles=titles, horizontal_spacing=0.065)
    for column, q in enumerate(chosen, 1):
        samples = {
            "all data": attribution.baseline[:, q],
            "predicted": predicted[q, :, q],
            "retrained": truth.measurements[q, :, q],
        }
        together = torch.cat(list(samples.values()))
        least, most = float(together.min()), float(together.max())
        grid = np.linspace(least - 0.1 * (most - least), most + 0.1 * (most - least), 200)
        for name, values in samples.items():
            figure.add_scatter(
                x=grid,
                y=gaussian_kde(values.double().numpy())(grid),
                mode="lines",
                fill="tozeroy" if name == "all data" else None,
                line={"color": COLOURS[name], "dash": "dash" if name == "predicted" else "solid"},
                name=name,
                legendgroup=name,
                showlegend=column == 1,
                row=1,
                col=column,
            )
        figure.update_xaxes(title_text="prediction (standardised strength)", row=1, col=column)
        figure.update_yaxes(showticklabels=False, row=1, col=column)
    x, y = ((each.diagonal() / deviation).tolist() for each in of_own)
    limits = [0.8 * min(x + y), 1.2 * max(x + y)]
    last = {"row": 1, "col": SHOWN + 1}
    line = {"color": "#999999", "dash": "dot"}
    figure.add_scatter(x=limits, y=limits, mode="lines", line=line, showlegend=False, **last)
    figure.add_scatter(x=x, y=y, mode="markers", marker={"color": COLOURS["retrained"]}, showlegend=False, **last)
    ticks = {"type": "log", "tickvals": [0.25, 0.5, 1, 2, 4]}
    figure.update_xaxes(title_text="from all data (deviations)", **ticks, **last)
    figure.update_yaxes(title_text="from the prediction", **ticks, **last)
    title = f"Without the {REMOVED} rows that matter most to each query"
    legend = {"orientation": "h", "y": 1.3, "x": 1, "xanchor": "right"}
    return figure.update_layout(title=title, template="plotly_white", width=1250, height=420, legend=legend)


def main() -> None:
    """Record, attribute, remove the most influential rows, retrain, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="the table as text")
    parser.add_argument("--output", required=True, type=Path, help="a directory for runs, truth and attributions")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    data = ConcreteData(options.data)
    data.setup("fit")
    ensemble = record(data, options.output / "runs", max(RUNS))
    attributions = [
        answer(
            ensemble[:runs],
            data,
            UnrolledDifferentiation(horizon=None),
            options.output / "attributions" / f"unrolled-{runs}",
        )
        for runs in RUNS
    ]
    # chosen by the attribution with the most runs, which is also drawn; the other is counted on the same removals
    truth = retrain(
        ConcreteRegressor,
        data,
        trainer=make_trainer,
        subsets=top_removals(attributions[-1], "wasserstein", k=REMOVED),
        seeds=range(1000, 1000 + SEEDS),
        queries=Subset(data.validation, range(QUERIES)),
        measurement="prediction",
        ensemble=ensemble,
        output=options.output / "chosen-removals",
    )
    for attribution in attributions:
        print_counts(f"{REMOVED} chosen rows", attribution, truth, own=True)
        if (options.output / "truth").exists():
            print_counts("random tenths", attribution, GroundTruth.load(options.output / "truth"))
    draw(attributions[-1], truth).write_html(options.output / "distributions.html", config={"displayModeBar": False})


if __name__ == "__main__":
    main()
