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

QUERIES, REMOVED, SEEDS, FIRST_SEED = 2, 20, 256, 10_000
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
    return attribute(ensemble, Classifier(), data, estimator=UnrolledDifferentiation(), **asked)


def balanced(mean: Tensor, gain: Tensor, number: int) -> list[int]:
    """Take the images of the largest gain ``(N,)``, each against the shift of the mean by those taken before."""
    order, group, shift = gain.argsort(descending=True).tolist(), [], 0.0
    for _ in range(number):
        image = next(image for image in order if image not in group and mean[image] * shift <= 0)
        group.append(image)
        shift += float(mean[image])
    return group


def choose(attribution: Attribution, number: int = REMOVED, seed: int = 0) -> Groups:
    """Choose groups of images for each query, by the recorded runs alone."""
    mean, variance = attribution.influence("mean"), attribution.influence("variance")
    generator, groups = torch.Generator().manual_seed(seed), []
    for of_mean, of_variance in zip(mean, variance, strict=True):
        top = of_mean.argsort(descending=True)
        ends = top[:number], top[-number:]  # of one sign, so that they add up
        group = {
            "variance up": balanced(of_mean, of_variance, number),
            "variance down": balanced(of_mean, -of_variance, number),
            "mean": max(ends, key=lambda end, of_mean=of_mean: of_mean[end].sum().abs()).tolist(),
            "random": torch.randperm(len(of_mean), generator=generator)[:number].tolist(),
        }
        groups.append(group)
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
    return torch.empty_like(p).scatter_(
        0, order, (p[order] * torch.arange(len(p), 0, -1)).cummax(0).values.clamp_max(1)
    )


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


def figure(data: Digits, queries: list[int], groups: Groups, rows: list[dict], shown: int = 10):
    """Draw each query beside the first images of two groups, and the retrained changes with their intervals."""
    (images, labels), (queried, true) = data.train.tensors, data.validation.tensors
    drawn = ("variance up", "variance down")
    titles = ["query", *(f"{name}: {shown} of {len(groups[0][name])}" for name in drawn), "trained without the group"]
    widths = [0.09, 0.29, 0.29, 0.33]
    plot = make_subplots(len(queries), 4, column_widths=widths, subplot_titles=titles, horizontal_spacing=0.03)
    for row, (query, of_query) in enumerate(zip(queries, groups, strict=True), 1):
        plot.add_heatmap(z=queried[query, 0].flip(0).numpy(), row=row, col=1)
        plot.update_xaxes(title_text=f"label {true[query]}", title_standoff=2, row=row, col=1)
        for column, name in enumerate(drawn, 2):
            rectangle = torch.cat([torch.cat([*half], 1) for half in images[of_query[name][:shown], 0].chunk(2)])
            plot.add_heatmap(z=rectangle.flip(0).numpy(), row=row, col=column)
            text = " ".join(str(int(labels[n])) for n in of_query[name][:shown])
            plot.update_xaxes(title_text=f"labels {text}", title_standoff=2, row=row, col=column)
        for each in (each for each in rows if each["query"] == row - 1):
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
        ticks = {"type": "log", "tickvals": [0.5, 0.7, 1, 1.4, 2], "title_text": "variance ratio", "side": "right"}
        plot.update_yaxes(**ticks, row=row, col=4)
    plot.update_traces(colorscale="gray_r", showscale=False, selector={"type": "heatmap"})
    for column in range(1, 4):
        plot.update_xaxes(showticklabels=False, showgrid=False, zeroline=False, constrain="domain", col=column)
        plot.update_yaxes(visible=False, col=column)
    for axis in (f"x{number}" if number > 1 else "x" for number in range(1, 4 * len(queries)) if number % 4):
        plot.update_yaxes(scaleanchor=axis, selector={"anchor": axis})
    plot.update_xaxes(title_text="shift of the mean (standard deviations)", row=len(queries), col=4)
    legend = {"orientation": "h", "y": -0.25, "x": 1, "xanchor": "right"}
    size = {"width": 1200, "height": 190 * len(queries) + 120, "margin": {"t": 40, "l": 20}}
    return plot.update_layout(template="plotly_white", legend=legend, **size)


def main() -> None:
    """Choose, confirm on fresh seeds, print the figures and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", required=True, help="Ensemble recorded with config.yaml.")
    parser.add_argument("--output", type=Path, default=Path("mnist_variance"))
    options, data = parser.parse_args(), Digits()
    ensemble = Ensemble.open(options.runs)
    data.setup("fit")
    queries = undecided(ensemble, data)
    attribution = answer(ensemble, data, queries, options.output / "attribution")
    for name in ("mean", "spread"):
        print(f"images with a significant influence on the {name}: {attribution.significant(name).sum(1).tolist()}")
    groups = choose(attribution)
    rows = compare(attribution, confirm(data, queries, groups, SEEDS, options.output / "truth"), groups)
    for row in rows:
        ratio, shift = ("{:.2f} [{:.2f}, {:.2f}]".format(*row[key]) for key in ("ratio", "shift"))
        print(f"query {queries[row['query']]}, {row['group']}:")
        print(f"    variance times {ratio}, p {row['p of ratio']:.2g}, predicted {row['predicted ratio']:.2f}")
        print(f"    mean {shift}, p {row['p of shift']:.2g}, predicted {row['predicted shift']:.2f}")
    picture = figure(data, queries, groups, rows)
    picture.write_html(options.output / "mnist_variance.html", config={"displayModeBar": False})


if __name__ == "__main__":
    main()
