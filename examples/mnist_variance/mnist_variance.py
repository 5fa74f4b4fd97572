"""Training images that change how much a prediction depends on the seed, but not the prediction on average.

As figure 11 of arXiv 2506.12965. Recorded runs choose the queries, and for each query groups of training images; fresh
seeds are then trained without each group.

    python -m examples.mnist_variance.mnist_variance --runs mnist_variance/runs --output mnist_variance

Trainings are kept in the output directory; another call continues where the first one stopped.
"""

import argparse
from pathlib import Path

import lightning.pytorch as pl
import torch
import yaml
from plotly.subplots import make_subplots
from torch import Tensor
from torch.utils.data import Subset

from examples.mnist_variance.digits import Classifier, Digits
from lightning_dtda import Attribution, Ensemble, GroundTruth, UnrolledDifferentiation, attribute, retrain
from lightning_dtda.statistics.differences import Mean, Spread

QUERIES, REMOVED, SEEDS, FIRST_SEED = 4, 20, 256, 10_000
Groups = list[dict[str, list[int]]]
COLOURS = {"variance up": "#d55e00", "variance down": "#0072b2", "mean": "#000000", "random": "#999999"}


def make_trainer(**settings) -> pl.Trainer:
    """Create the Trainer of the configuration."""
    config = yaml.safe_load((Path(__file__).parent / "config.yaml").read_text(encoding="utf-8"))
    return pl.Trainer(**config["trainer"] | settings)


def undecided(ensemble: Ensemble, data: Digits, number: int = QUERIES) -> list[int]:
    """Choose the queries that the seed decides: the share of runs with a positive margin is closest to a half."""
    module, (images, labels) = Classifier(), data.validation.tensors
    positive = torch.zeros(len(labels))
    with torch.inference_mode():
        for run in ensemble:
            scores = torch.func.functional_call(module, run.theta(run.steps), images)
            positive += scores.softmax(1)[range(len(labels)), labels] > 0.5
    return (positive / len(ensemble) - 0.5).abs().argsort(stable=True)[:number].tolist()


def answer(ensemble: Ensemble, data: Digits, queries: list[int], output: Path | None) -> Attribution:
    """Predict what removing each image does to the margins of the queries."""
    asked = {"queries": Subset(data.validation, queries), "measurement": "margin", "output": output}
    return attribute(ensemble, Classifier(), data, estimator=UnrolledDifferentiation(horizon=None), **asked)


def choose(attribution: Attribution, number: int = REMOVED, seed: int = 0) -> Groups:
    """Choose groups of images for each query, by the recorded runs alone.

    For the variance, among the images whose influence on the mean is not significant on its own (p > 0.05).
    """
    mean, variance = attribution.influence("mean"), attribution.influence("variance")
    little = attribution.p_values("mean") > 0.05
    generator, groups = torch.Generator().manual_seed(seed), []
    for query in range(len(attribution.queries)):
        candidates = variance[query].where(little[query], 0)
        top = mean[query].argsort(descending=True)
        rising, falling = top[:number], top[-number:]
        chosen = {
            "variance up": candidates.topk(number).indices,
            "variance down": (-candidates).topk(number).indices,
            # of one sign, so that they add up
            "mean": max(rising, falling, key=lambda group, query=query: mean[query, group].sum().abs()),
            "random": torch.randperm(mean.shape[1], generator=generator)[:number],
        }
        groups.append({name: group.tolist() for name, group in chosen.items()})
    return groups


def confirm(data: Digits, queries: list[int], groups: Groups, seeds: int, output: Path | None, trainer=make_trainer):
    """Train without each group, on fresh seeds."""
    return retrain(
        Classifier,
        data,
        trainer=trainer,
        # two queries may have a group in common
        subsets=sorted({tuple(sorted(group)) for of_query in groups for group in of_query.values()}),
        seeds=range(FIRST_SEED, FIRST_SEED + seeds),
        queries=Subset(data.validation, queries),
        measurement="margin",
        stacked=True,
        output=output,
    )


def holm(p: Tensor) -> Tensor:
    """Return p-values ``(tests,)`` adjusted for all tests together."""
    order = p.argsort()
    adjusted = (p[order] * torch.arange(len(p), 0, -1)).cummax(0).values.clamp_max(1)
    return torch.empty_like(p).scatter_(0, order, adjusted)


def compare(attribution: Attribution, truth: GroundTruth, groups: Groups) -> list[dict]:
    """Compare each group with training on everything, in pairs that start from the same parameters.

    Returns:
        For each query and group the ratio of variances and the shift of the mean in standard deviations, predicted and
        retrained, the latter with the ends of their intervals, and p-values by Holm.
    """
    rows = []
    for query, of_query in enumerate(groups):
        baseline, before = truth.baseline[:, query].double(), attribution.baseline[:, query].double()
        for name, group in of_query.items():
            real = truth.measurements[truth.removed.index(tuple(sorted(group))), :, query].double()
            pair = baseline[:, None], real[:, None]
            predicted = attribution.predict(group)[:, query].double()
            rows.append(
                {
                    "query": query,
                    "group": name,
                    "predicted ratio": float(predicted.var() / before.var()),
                    "ratio": [(2 * end).exp().item() for end in (Spread()(*pair), *Spread().interval(*pair, 0.95))],
                    "p of ratio": Spread().p_values(*pair).item(),
                    "predicted shift": float((predicted - before).mean() / before.std()),
                    "shift": [(end / baseline.std()).item() for end in (Mean()(*pair), *Mean().interval(*pair, 0.95))],
                    "p of shift": Mean().p_values(*pair).item(),
                }
            )
    for key in ("p of ratio", "p of shift"):
        for row, value in zip(rows, holm(torch.tensor([row[key] for row in rows])), strict=True):
            row[key] = value.item()
    return rows


def figure(data: Digits, queries: list[int], groups: Groups, rows: list[dict], shown: int = 8):
    """Draw each query beside the first images of two groups, and the retrained changes with their intervals."""
    (images, labels), (queried, true) = data.train.tensors, data.validation.tensors
    drawn = ("variance up", "variance down")
    titles = ["query", *(f"{shown} of {len(groups[0][name])}: {name}" for name in drawn), "retrained"]
    plot = make_subplots(
        len(queries), 4, column_widths=[0.09, 0.29, 0.29, 0.33], subplot_titles=titles, horizontal_spacing=0.03
    )
    for row, (query, of_query) in enumerate(zip(queries, groups, strict=True), 1):
        plot.add_heatmap(z=queried[query, 0].flip(0).numpy(), row=row, col=1)
        plot.update_xaxes(title_text=f"label {true[query]}", title_standoff=2, row=row, col=1)
        for column, name in enumerate(drawn, 2):
            strip = torch.cat([images[n, 0] for n in of_query[name][:shown]], 1)
            plot.add_heatmap(z=strip.flip(0).numpy(), row=row, col=column)
            text = " ".join(str(int(labels[n])) for n in of_query[name][:shown])
            plot.update_xaxes(title_text=f"labels {text}", title_standoff=2, row=row, col=column)
        for each in rows:
            if each["query"] != row - 1:
                continue
            (x, left, right), (y, low, high) = each["shift"], each["ratio"]
            ends = {"thickness": 1.2, "width": 0, "symmetric": False}
            plot.add_scatter(
                x=[x], y=[y], name=each["group"], mode="markers", marker={"color": COLOURS[each["group"]], "size": 9},
                error_x=ends | {"array": [right - x], "arrayminus": [x - left]},
                error_y=ends | {"array": [high - y], "arrayminus": [y - low]},
                showlegend=row == 1, row=row, col=4,
            )  # fmt: skip
        plot.add_hline(1, line_dash="dot", line_color="grey", row=row, col=4)
        plot.add_vline(0, line_dash="dot", line_color="grey", row=row, col=4)
        ticks = {"type": "log", "tickvals": [0.5, 0.7, 1, 1.4, 2], "title_text": "variance, times", "side": "right"}
        plot.update_yaxes(**ticks, row=row, col=4)
    plot.update_traces(colorscale="gray_r", showscale=False, selector={"type": "heatmap"})
    for column in range(1, 4):
        plot.update_xaxes(showticklabels=False, constrain="domain", col=column)
        plot.update_yaxes(showticklabels=False, col=column)
    for number in range(1, 4 * len(queries) + 1):
        if number % 4:
            plot.update_yaxes(scaleanchor=f"x{number}", selector={"anchor": f"x{number}" if number > 1 else "x"})
    plot.update_xaxes(title_text="shift of the mean (standard deviations)", row=len(queries), col=4)
    legend = {"orientation": "h", "y": -0.1, "x": 1, "xanchor": "right"}
    return plot.update_layout(template="plotly_white", width=1300, height=190 * len(queries) + 80, legend=legend)


def main() -> None:
    """Choose, confirm on fresh seeds, print the figures and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", required=True, help="Ensemble recorded with config.yaml.")
    parser.add_argument("--output", type=Path, default=Path("mnist_variance"))
    parser.add_argument("--seeds", type=int, default=SEEDS, help="Number of trainings without each group.")
    options = parser.parse_args()
    data, ensemble = Digits(), Ensemble.open(options.runs)
    data.setup("fit")
    queries = undecided(ensemble, data)
    attribution = answer(ensemble, data, queries, options.output / "attribution")
    for name in ("mean", "spread"):
        counts = attribution.significant(name).sum(1).tolist()
        print(f"images with a significant influence on the {name}, of each query: {counts}")
    groups = choose(attribution)
    rows = compare(attribution, confirm(data, queries, groups, options.seeds, options.output / "truth"), groups)
    for row in rows:
        ratio, shift = ("{:.2f} [{:.2f}, {:.2f}]".format(*row[key]) for key in ("ratio", "shift"))
        print(f"query {queries[row['query']]}, {row['group']}:")
        print(f"    variance times {ratio}, p {row['p of ratio']:.2g}, predicted {row['predicted ratio']:.2f}")
        print(f"    mean {shift}, p {row['p of shift']:.2g}, predicted {row['predicted shift']:.2f}")
    figure(data, queries, groups, rows).write_html(options.output / "mnist_variance.html")


if __name__ == "__main__":
    main()
