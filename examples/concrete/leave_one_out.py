"""Leave one out, many times: is leave-one-out broken, or just noisy?

    python -m examples.concrete.leave_one_out --data concrete.txt --output evaluation

A single example moves a prediction by little compared with a new seed, so one retraining, or ten, show nothing. Each of
24 training rows, from the most to the least influential, is left out. A power analysis gives the number of retrainings
that would show the predicted effects, and that number is trained, up to ``--most``. Writes ``leave_one_out.json`` and
``leave_one_out.html``: predicted and real shifts of the mean, and their correlation against the number of retrainings,
with the best correlation that this number allows (paper, figure 8).

Runs, predictions and trainings are kept in the output directory, which may be that of ``examples.concrete.evaluation``;
another call continues where the first one stopped.
"""

import argparse
import json
import logging
from pathlib import Path
from typing import NamedTuple

import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots
from torch import Tensor
from torch.utils.data import Subset

from examples.concrete.concrete import ConcreteData, ConcreteRegressor
from examples.concrete.evaluation import QUERIES, RUNS, answer, make_trainer, record
from lightning_dtda import Attribution, GroundTruth, UnrolledDifferentiation, retrain
from lightning_dtda.evaluation import LeaveOneOutCorrelation

ROWS, FIRST_SEED = 24, 2000
BASELINE = 2
"""Number of trainings on everything per training without a row: their noise is in the shifts of all rows."""


class Shifts(NamedTuple):
    """Shifts of the mean ``(queries, rows)``, in standard deviations of the query's prediction over seeds."""

    predicted: Tensor
    real: Tensor
    error: Tensor
    """Standard error of the real shifts."""


def over_the_range(attribution: Attribution, rows: int) -> list[int]:
    """Choose training rows from the most to the least influential, evenly spaced on the logarithm of their rank.

    Rows are ranked by the root mean square, over queries, of their influence on the mean in standard deviations.
    """
    of_queries = attribution.influence("mean") / attribution.baseline.double().std(0)[:, None]
    order = of_queries.square().mean(0).argsort(descending=True)
    ranks = (
        torch.logspace(0, torch.tensor(len(order)).log10(), 4 * rows, dtype=torch.float64).round().long().unique() - 1
    )
    # unique ranks thin out the strong end: take the remaining ones evenly
    return order[ranks[torch.linspace(0, len(ranks) - 1, rows).round().long()]].tolist()


def shifts(attribution: Attribution, truth: GroundTruth) -> Shifts:
    """Return predicted and real shifts of the mean, with the standard error of the real ones."""
    deviation = truth.baseline.double().std(0)[:, None]
    rows = [row for (row,) in truth.removed]
    of_rows = truth.measurements.double().var(1).T / len(truth.seeds)
    of_all = truth.baseline.double().var(0)[:, None] / len(truth.baseline_seeds)
    return Shifts(
        attribution.influence("mean")[:, rows] / deviation,
        truth.influence("mean") / deviation,
        (of_rows + of_all).sqrt() / deviation,
    )


def correlation(attribution: Attribution, truth: GroundTruth, seeds: int, kind: str, replicates: int = 0) -> dict:
    """Correlate predicted and real shifts, using only the first seeds."""
    metric = LeaveOneOutCorrelation("mean", kind, replicates=replicates)
    predicted = torch.stack([attribution.predict(list(rows)) for rows in truth.removed])
    metric.update(predicted, attribution.baseline, truth.measurements[:, :seeds], truth.baseline[: BASELINE * seeds])
    return {name: float(value) for name, value in metric.compute().items() if value.ndim == 0}


def scaled(shift: Tensor) -> Tensor:
    """Return the position at which a shift is drawn: its square root, with its sign."""
    return shift.sign() * shift.abs().sqrt()


def draw(found: Shifts, seeds: int, curves: dict[str, list[dict]], numbers: list[int]) -> go.Figure:
    """Draw predicted against real shifts, and the correlation against the number of retrainings."""
    titles = (f"{seeds} retrainings without each row", "fewer retrainings")
    figure = make_subplots(1, 2, subplot_titles=titles, horizontal_spacing=0.11)
    # most shifts are small and would lie at the origin on a linear scale
    ticks = [sign * size for size in (2, 1, 0.5, 0.1) for sign in (-1, 1)] + [0]
    scale = {"tickvals": scaled(torch.tensor(ticks)).tolist(), "ticktext": [f"{tick:g}" for tick in ticks]}
    limit = 1.05 * float(scaled(torch.stack([found.predicted, found.real])).abs().max())
    line = {"color": "#999999", "dash": "dot"}
    figure.add_scatter(x=[-limit, limit], y=[-limit, limit], mode="lines", line=line, showlegend=False, row=1, col=1)
    shown = found.real.abs() > 1.96 * found.error
    below, above = found.real - 1.96 * found.error, found.real + 1.96 * found.error
    for which, name, colour in ((~shown, "not significant", "#bdbdbd"), (shown, "significant", "#08519c")):
        figure.add_scatter(
            x=scaled(found.predicted[which]).tolist(),
            y=scaled(found.real[which]).tolist(),
            error_y={
                "array": (scaled(above) - scaled(found.real))[which].tolist(),
                "arrayminus": (scaled(found.real) - scaled(below))[which].tolist(),
                "thickness": 0.7,
                "width": 0,
                "visible": name == "significant",
            },
            mode="markers",
            marker={"color": colour, "size": 5},
            name=name,
            row=1,
            col=1,
        )
    for kind, colour in (("pearson", "#08519c"), ("spearman", "#e6550d")):
        for value, dash, name in (
            ("score", "solid", kind.title()),
            ("ceiling", "dot", f"{kind.title()}, noise ceiling"),
        ):
            figure.add_scatter(
                x=numbers,
                y=[each[value] for each in curves[kind]],
                mode="lines+markers",
                line={"color": colour, "dash": dash},
                name=name,
                row=1,
                col=2,
            )
    figure.update_xaxes(title_text="predicted shift of the mean (deviations; square-root scale)", **scale, row=1, col=1)
    figure.update_yaxes(title_text="real shift", **scale, row=1, col=1)
    figure.update_xaxes(title_text="retrainings without each row", type="log", row=1, col=2)
    figure.update_xaxes(tickvals=numbers[::2], ticktext=[str(number) for number in numbers[::2]], row=1, col=2)
    figure.update_yaxes(title_text="correlation over rows, mean of queries", range=[0, 1.02], row=1, col=2)
    title = "Leaving out one training row: noisy, not broken"
    return figure.update_layout(title=title, template="plotly_white", width=1150, height=480)


def main() -> None:
    """Record, attribute, compute the number of retrainings needed, retrain, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="the table as text")
    parser.add_argument("--output", required=True, type=Path, help="a directory for runs, truth and attributions")
    parser.add_argument("--most", type=int, default=3200, help="maximum number of retrainings without each row")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    data = ConcreteData(options.data)
    data.setup("fit")
    ensemble = record(data, options.output / "runs", max(RUNS))
    path = options.output / "attributions" / f"unrolled-{max(RUNS)}"
    attribution = answer(ensemble, data, UnrolledDifferentiation(horizon=None), path)
    rows = over_the_range(attribution, ROWS)
    needed = attribution.retrainings_needed().estimate[:, rows]
    # for each row, to show its effect on the query that shows it best
    asked = needed.amin(0)
    seeds = int(asked.max().clamp(max=options.most))
    print(f"Retrainings needed for each row, by power analysis: {asked.long().tolist()}; running {seeds} for each.")
    truth = retrain(
        ConcreteRegressor,
        data,
        trainer=make_trainer,
        subsets=[[row] for row in rows],
        seeds=range(FIRST_SEED, FIRST_SEED + seeds),
        baseline_seeds=range(FIRST_SEED, FIRST_SEED + BASELINE * seeds),
        queries=Subset(data.validation, range(QUERIES)),
        measurement="prediction",
        stacked=True,
        ensemble=ensemble,
        output=options.output / "leave-one-out",
    )
    truth = truth.finished()
    seeds, found = len(truth.seeds), shifts(attribution, truth)
    numbers = [2**k for k in range(2, 12) if 2**k < seeds] + [seeds]
    kinds = ("pearson", "spearman")
    curves = {kind: [correlation(attribution, truth, number, kind) for number in numbers] for kind in kinds}
    scores = {kind: correlation(attribution, truth, seeds, kind, replicates=500) for kind in kinds}
    for kind, score in scores.items():
        print(f"{kind}: {score['score']:.3f} [{score['low']:.3f}, {score['high']:.3f}], ceiling {score['ceiling']:.3f}")
    expected, shown = needed <= seeds, found.real.abs() > 1.96 * found.error
    agrees = found.predicted.sign() == found.real.sign()
    power = {
        "pairs": shown.numel(),
        "expected": int(expected.sum()),
        "expected_and_shown": int((expected & shown & agrees).sum()),
        "others_shown": int((~expected & shown).sum()),
        "shown_of_other_sign": int((shown & ~agrees).sum()),
    }
    print(power)
    content = {
        "rows": rows,
        "seeds": seeds,
        "asked": asked.tolist(),
        "power": power,
        "scores": scores,
        "numbers": numbers,
        "curves": curves,
    }
    (options.output / "leave_one_out.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    draw(found, seeds, curves, numbers).write_html(
        options.output / "leave_one_out.html", config={"displayModeBar": False}
    )


if __name__ == "__main__":
    main()
