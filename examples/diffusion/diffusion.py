"""Which training images matter to a diffusion model's loss on an image, and do rankings agree about it?

    python -m examples.diffusion.diffusion --config examples/diffusion/config.yaml --runs diffusion/runs \
        --truth diffusion/truth --output diffusion

Ranks training images by their influence on the denoising loss of held-out images: on its distribution over seeds
(Wasserstein), on its mean, and on one seed. Compares the rankings, scores the estimators and two simple baselines
against retraining, and writes ``diffusion.html`` and ``diffusion.json``. Attributions are kept in the output directory.
"""

import argparse
import json
import logging
import warnings
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch.cli import LightningCLI
from plotly.subplots import make_subplots
from scipy import stats
from torch.nn import functional
from torch.utils.data import Subset

from examples.diffusion.denoising import denoising_loss
from lightning_dtda import Attribution, Ensemble, GroundTruth, InfluenceFunctions, UnrolledDifferentiation, attribute
from lightning_dtda.estimators import EKFAC, TracIn
from lightning_dtda.evaluation import compare, evaluate

ESTIMATORS = {
    "unrolled differentiation": UnrolledDifferentiation,
    "influence functions, EK-FAC": lambda: InfluenceFunctions(EKFAC()),
    "TracIn, four checkpoints": lambda: TracIn(checkpoints=4),
}
FIRST, TOP, SPLITS, SHOWN = "unrolled differentiation", 10, 50, (0, 3, 4)
RANKINGS = ("wasserstein", "mean", "one seed")


def of_runs(attribution, runs):
    """Return an attribution of some of its runs, given by their positions."""
    names = tuple(attribution.runs[run] for run in runs)
    return replace(attribution, baseline=attribution.baseline[runs], responses=attribution.responses[runs], runs=names)


def rankings(attribution, seed=0):
    """Return, by name of the ranking, the size of each example's influence ``(queries, examples)``."""
    return {
        "wasserstein": attribution.influence("wasserstein", runs="all").abs(),
        "mean": attribution.influence("mean", runs="all").abs(),
        "one seed": attribution.responses[seed].double().abs(),
    }


def agreement(left, right):
    """Return rank correlation and overlap of the top ten for each query ``(2, queries)``."""
    pairs = list(zip(left, right, strict=True))
    overlap = [len({*a.topk(TOP).indices.tolist()} & {*b.topk(TOP).indices.tolist()}) for a, b in pairs]
    return np.array([[stats.spearmanr(a, b).statistic for a, b in pairs], overlap])


def interval(values):
    """Return the mean and the limits of Student's 95 % interval over queries, along the last axis."""
    mean, half = values.mean(-1), stats.sem(values, axis=-1) * stats.t.ppf(0.975, values.shape[-1] - 1)
    return np.stack([mean, mean - half, mean + half], -1).tolist()


def compare_rankings(attribution):
    """Compare the three rankings with each other, with all runs and between halves of the runs.

    Rankings from different seeds differ by noise alone. So a ranking of a random half of the runs is compared with the
    same ranking of the other half, and with another one of it. If the geometric mean of two rankings' agreements with
    themselves exceeds the agreement between them, they differ by more than noise.

    Returns:
        By pair of rankings: mean over queries and 95 % interval of rank correlation and overlap ``(2, 3)``, with all
        runs and between halves; the excess of the rank correlation over noise, with its interval; and the p-value,
        corrected by Holm for three pairs.
    """
    generator, number = torch.Generator().manual_seed(0), len(attribution.runs)
    found, between = rankings(attribution), {}
    for _ in range(SPLITS):
        half = torch.randperm(number, generator=generator).tolist()
        first, second = (rankings(of_runs(attribution, part)) for part in (half[: number // 2], half[number // 2 :]))
        for a, b in product(RANKINGS, RANKINGS):
            between.setdefault((a, b), []).append(agreement(first[a], second[b]))
    between = {pair: np.mean(values, 0) for pair, values in between.items()}
    rows = {f"{name}, itself": {"between halves": interval(between[name, name])} for name in RANKINGS}
    values = []
    for a, b in combinations(RANKINGS, 2):
        crossed = (between[a, b] + between[b, a]) / 2
        excess = np.sqrt(between[a, a][0].clip(0) * between[b, b][0].clip(0)) - crossed[0]
        of_all = interval(agreement(found[a], found[b]))
        rows[f"{a}, {b}"] = {"all runs": of_all, "between halves": interval(crossed), "excess": interval(excess)}
        values.append(stats.ttest_1samp(excess, 0).pvalue)
    corrected = np.maximum.accumulate(np.sort(values) * (len(values) - np.arange(len(values)))).clip(max=1)
    for position, value in zip(np.argsort(values), corrected, strict=True):
        rows[list(rows)[len(RANKINGS) + position]]["p"] = float(value)
    return rows


def by_pixels(queries, training, names):
    """Return a prediction that knows no model: the cosine similarity of images, for the mean only."""
    left, right = (torch.stack([image.flatten() for (image,) in images]) for images in (queries, training))
    similarity = functional.normalize(left, dim=1) @ functional.normalize(right, dim=1).T
    return Attribution(torch.zeros(1, len(queries)), similarity[None], ("pixels",), names)


def tiles(queries, training, found):
    """Arrange shown queries and, in a row for each ranking, the images ranked first; grey in [-1, 1]."""
    lines = []
    for query in SHOWN:
        rows = [torch.stack([training[n][0] for n in found[name][query].topk(TOP).indices]) for name in found]
        images = functional.pad(torch.stack(rows).mean(2), (1, 1, 1, 1), value=1.0)
        asked = functional.interpolate(queries[query][0].mean(0)[None, None], scale_factor=float(len(found)))[0, 0]
        asked = functional.pad(asked, [len(found)] * 4, value=1.0)
        lines += [torch.cat([asked, images.transpose(1, 2).flatten(0, 1).flatten(1)], 1)]
        lines += [torch.ones(3, lines[0].shape[1])]
    return torch.cat(lines[:-1]).numpy()


def draw(queries, training, found, scores):
    """Draw the images ranked first, and the scores with their intervals and noise ceilings."""
    titles = (
        "query, and the ten training images ranked first",
        "do predictions order random halves as retraining does?",
    )
    plot = make_subplots(1, 2, subplot_titles=titles, column_widths=[0.55, 0.45], horizontal_spacing=0.22)
    plot.add_heatmap(z=tiles(queries, training, found), colorscale="gray", showscale=False, row=1, col=1)
    side = queries[0][0].shape[-1] + 2
    middles = [(row + 0.5) * side + 3 * (row // len(found)) for row in range(len(SHOWN) * len(found))]
    square = {"autorange": "reversed", "scaleanchor": "x", "constrain": "domain", "showgrid": False}
    names = [name.replace("w", "W") for name in found] * len(SHOWN)
    plot.update_yaxes(tickvals=middles, ticktext=names, **square, row=1, col=1)
    plot.update_xaxes(visible=False, constrain="domain", row=1, col=1)
    for difference, colour, symbol in (("mean", "#0072b2", "circle"), ("wasserstein", "#d55e00", "diamond")):
        known = {name: each[difference] for name, each in scores.items() if difference in each}
        score, low, high = (np.array([value[key] for value in known.values()]) for key in ("score", "low", "high"))
        plot.add_scatter(
            x=score,
            y=list(known),
            error_x={"array": high - score, "arrayminus": score - low},
            orientation="h",
            mode="markers",
            marker={"color": colour, "size": 9, "symbol": symbol},
            name=difference.replace("w", "W"),
            **{"row": 1, "col": 2},
        )
        plot.add_vline(known[FIRST]["ceiling"], line_dash="dot", line_color=colour, row=1, col=2)
    plot.add_scatter(x=[None], y=[None], mode="lines", line={"dash": "dot", "color": "grey"}, name="noise allows")
    plot.update_xaxes(title_text="distributional LDS (rank correlation with retraining)", range=[-0.1, 1], row=1, col=2)
    plot.update_yaxes(categoryorder="array", categoryarray=list(scores)[::-1], row=1, col=2)
    plot.update_layout(legend={"orientation": "h", "x": 1, "xanchor": "right", "y": -0.16}, margin_t=50)
    return plot.update_layout(template="plotly_white", width=1250, height=600, scattermode="group", scattergap=0.7)


def main():
    """Attribute, compare rankings, evaluate, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="configuration that was recorded")
    parser.add_argument("--runs", required=True, help="recorded runs")
    parser.add_argument("--truth", required=True, help="ground truth of lightning-dtda retrain")
    parser.add_argument("--output", type=Path, default=Path("diffusion"))
    parser.add_argument("--device", help="such as cuda; by default that of the recording")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "LightningCLI's args parameter")  # of options that are not meant for it
    cli = LightningCLI(run=False, args=["--config", options.config], seed_everything_default=False)
    data, truth = cli.datamodule, GroundTruth.load(options.truth)
    data.setup("fit")
    queries, ensemble = Subset(data.validation, truth.queries), Ensemble.open(options.runs)
    attributions = {}
    for name, make in ESTIMATORS.items():
        asked = {"queries": queries, "measurement": denoising_loss, "estimator": make(), "device": options.device}
        kept = options.output / "attributions" / name.replace(" ", "-")
        attributions[name] = attribute(ensemble, cli.model, data, output=kept, **asked)
    attributions["unrolled, one seed"] = of_runs(attributions[FIRST], [0])
    attributions["pixel similarity"] = by_pixels(queries, data.train, truth.queries)
    evaluations = {
        name: evaluate(each, truth, ["mean", "wasserstein"] if len(each.runs) > 1 else ["mean"])
        for name, each in attributions.items()
    }
    for name, each in evaluations.items():
        gains = compare(each, evaluations[FIRST])
        for (difference, score), gain in zip(each.scores.items(), gains.values(), strict=True):
            print(f"{name}: {difference} {score.score:.3f} [{score.low:.3f}, {score.high:.3f}] of {score.ceiling:.3f}")
            print(f"    above {FIRST}: {gain.gain:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]")
    rows = compare_rankings(attributions[FIRST])
    print(json.dumps(rows, indent=1))
    found = rankings(attributions[FIRST]) | {"pixels": attributions["pixel similarity"].responses[0]}
    scores = {name: each.content()["scores"] for name, each in evaluations.items()}
    content = json.dumps({"scores": scores, "rankings": rows}, indent=1)
    (options.output / "diffusion.json").write_text(content, encoding="utf-8")
    figure = draw(queries, data.train, found, scores)
    figure.write_html(options.output / "diffusion.html", config={"displayModeBar": False})


if __name__ == "__main__":
    main()
