"""The example that changes the mean most is not the one that changes the distribution most.

32 points in one dimension, as in figure 5 of arXiv 2506.12965. Recorded runs predict what leaving out each of them does
to the network's value in a gap; fresh seeds are then trained without each one.

    python -m examples.one_dimension.one_dimension --runs examples/one_dimension/runs --output one_dimension

Trainings are kept in the output directory; another call continues where the first one stopped.
"""

import argparse
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
import yaml
from plotly.subplots import make_subplots
from scipy.stats import gaussian_kde
from torch import Tensor
from torch.utils.data import TensorDataset

from examples.one_dimension.curve import ISOLATED, Curve, Points, data
from lightning_dtda import Attribution, Ensemble, GroundTruth, UnrolledDifferentiation, attribute, retrain
from lightning_dtda.evaluation import LeaveOneOutCorrelation
from lightning_dtda.statistics.differences import Spread, Wasserstein

GRID = torch.linspace(-2.5, 2.5, 101)
QUERY = 54
"""Position of the query in the grid, 0.2: in the gap, beside the isolated point."""
SEEDS, FIRST_SEED, SEED_OF_TARGET = 256, 10_000, 20_000
COLOURS = {"all points": "#666666", "mean": "#d55e00", "wasserstein": "#0072b2"}


def make_trainer(**settings) -> pl.Trainer:
    """Create the Trainer of the configuration."""
    config = yaml.safe_load((Path(__file__).parent / "config.yaml").read_text(encoding="utf-8"))
    return pl.Trainer(**config["trainer"] | settings)


def inputs(values: Tensor) -> TensorDataset:
    """Return queries at some inputs ``(Q,)``."""
    return TensorDataset(values[:, None], torch.zeros(len(values)))


def answer(ensemble: Ensemble, output: Path | None = None) -> Attribution:
    """Predict what leaving out each point does to the value at the query."""
    asked = {"queries": inputs(GRID[[QUERY]]), "measurement": "prediction", "output": output}
    # momentum keeps this training at the edge of stability: its exact derivative, horizon=None, grows without bounds
    return attribute(ensemble, Curve(), Points(), estimator=UnrolledDifferentiation(horizon="auto"), **asked)


def leave_one_out(output: Path | None, subsets=None, seeds=range(FIRST_SEED, FIRST_SEED + SEEDS), trainer=make_trainer):
    """Train without each point, with the same initial parameters, and return the functions on the grid."""
    return retrain(
        Curve,
        Points(),
        trainer=trainer,
        subsets=subsets or [[n] for n in range(len(data()[0]))],
        seeds=seeds,
        queries=inputs(GRID),
        measurement="prediction",
        stacked=True,
        output=output,
    )


def bootstrap(x: Tensor, y: Tensor, draws: int = 2000) -> dict[str, tuple[Tensor, Tensor]]:
    r"""Draw the shift of the mean and the squared distance W_2 over seeds.

    W_2^2 of two samples is too large by what their noise puts between them. A draw from the samples adds the same noise
    once more: the mean of the draws, less the estimate, is the bias, which is taken off the estimate once and off the
    draws twice.

    Args:
        x: Measurements of the trainings on everything ``(seeds,)``.
        y: Measurements without each example ``(examples, seeds)``, in pairs with x that start from the same parameters.
        draws: Number of draws.

    Returns:
        For ``mean`` and ``wasserstein``, the estimates ``(examples,)`` and the draws ``(draws, examples)``.
    """
    x, y = x.double(), y.double()
    chosen = torch.randint(len(x), (draws, len(x)), generator=torch.Generator().manual_seed(0))

    def both(a: Tensor, b: Tensor) -> Tensor:
        return torch.stack([b.mean(-1) - a.mean(-1), Wasserstein()(a.movedim(-1, 0), b.movedim(-1, 0)).square()])

    estimate = both(x.expand_as(y), y)
    drawn = torch.stack([both(x[row].expand_as(y), y[:, row]) for row in chosen], 1)
    bias = (drawn.mean(1) - estimate) * torch.tensor([[0.0], [1.0]])  # a mean has none
    (shift, distance), (shifts, distances) = estimate - bias, drawn - 2 * bias[:, None]
    return {"mean": (shift, shifts), "wasserstein": (distance.clamp_min(0).sqrt(), distances.clamp_min(0).sqrt())}


def interval(draws: Tensor) -> tuple[float, float]:
    """Return the interval of 95 % of draws ``(draws,)``."""
    return tuple(draws.quantile(torch.tensor([0.025, 0.975], dtype=draws.dtype)).tolist())


def correlate(attribution: Attribution, truth: GroundTruth, difference: str, kind: str, replicates: int = 500) -> dict:
    """Correlate predicted and retrained influences on the query over the examples."""
    metric = LeaveOneOutCorrelation(difference, kind, replicates=replicates)
    predicted = torch.stack([attribution.predict(list(removed)) for removed in truth.removed])
    query = slice(QUERY, QUERY + 1)
    metric.update(predicted, attribution.baseline, truth.measurements[..., query], truth.baseline[:, query])
    return {name: float(value) for name, value in metric.compute().items() if value.ndim == 0}


def figure(attribution: Attribution, truth: GroundTruth, firsts: dict[str, int], found: dict, shown: int = 60):
    """Draw functions with and without the two examples, the distributions at the query, and predictions beside them."""
    points, targets = (values.flatten().numpy() for values in data())
    removed = {"all points": None} | firsts
    names = {"all points": "all points", "mean": f"without point {firsts['mean']}, first by mean"}
    names |= {"wasserstein": f"without point {firsts['wasserstein']}, first by distance W₂"}
    titles = [*names.values(), f"value at x = {GRID[QUERY]:.1f}", "change of the mean", "distance W₂"]
    plot = make_subplots(2, 3, subplot_titles=titles, horizontal_spacing=0.07, vertical_spacing=0.15)
    for column, (name, example) in enumerate(removed.items(), 1):
        values = truth.baseline if example is None else truth.measurements[example]
        line = {"color": COLOURS[name], "width": 0.7}
        x = torch.cat([GRID, torch.tensor([torch.nan])]).repeat(shown)  # gaps between the functions
        y = torch.nn.functional.pad(values[:shown], (0, 1), value=torch.nan).flatten()
        plot.add_scatter(
            x=x.numpy(), y=y.numpy(), mode="lines", line=line, opacity=0.35, showlegend=False, row=1, col=column
        )
        kept = np.arange(len(points)) != (-1 if example is None else example)
        for which, symbol, size in ((kept, "circle", 5), (~kept, "x", 11)):
            marker = {"color": "black", "symbol": symbol, "size": size}
            at = {"x": points[which], "y": targets[which], "showlegend": False}
            plot.add_scatter(**at, mode="markers", marker=marker, row=1, col=column)
        plot.add_vline(GRID[QUERY].item(), line_dash="dot", line_color="black", row=1, col=column)
        plot.update_xaxes(title_text="x", row=1, col=column)
        sample = values[:, QUERY].double().numpy()
        grid = np.linspace(-0.5, 0.5, 300) + truth.baseline[:, QUERY].mean().item()
        style = {"color": COLOURS[name], "dash": "solid" if name == "all points" else "dash"}
        plot.add_scatter(x=grid, y=gaussian_kde(sample)(grid), line=style, name=names[name], row=2, col=1)
    plot.update_yaxes(range=[-1.9, 1.9], row=1)
    plot.update_yaxes(title_text="value of the network", row=1, col=1)
    plot.update_xaxes(title_text="value of the network", row=2, col=1)
    plot.update_yaxes(title_text="density over seeds", row=2, col=1)
    for column, difference in ((2, "mean"), (3, "wasserstein")):
        predicted, (real, draws) = attribution.influence(difference)[0], found[difference]
        low, high = draws.quantile(torch.tensor([0.025, 0.975], dtype=draws.dtype), 0)
        ends = [min(low.min().item(), predicted.min().item(), 0), 1.05 * max(high.max().item(), predicted.max().item())]
        line = {"color": "#999999", "dash": "dot"}
        plot.add_scatter(x=ends, y=ends, mode="lines", line=line, showlegend=False, row=2, col=column)
        marker = {"color": ["#bbbbbb"] * len(real), "size": 7}
        for name, example in firsts.items():
            marker["color"][example] = COLOURS[name]
        error = {"array": (high - real).numpy(), "arrayminus": (real - low).numpy(), "thickness": 0.8, "width": 0}
        style = {"mode": "markers", "marker": marker, "error_y": error, "showlegend": False}
        plot.add_scatter(x=predicted.numpy(), y=real.numpy(), **style, row=2, col=column)
        plot.update_xaxes(title_text="predicted", row=2, col=column)
        plot.update_yaxes(title_text="retrained", row=2, col=column)
    legend = {"orientation": "h", "y": -0.12, "x": 0.0}
    return plot.update_layout(template="plotly_white", width=1200, height=760, legend=legend, margin={"t": 40})


def main() -> None:
    """Predict, train without each point, print the figures and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", help="Ensemble recorded with config.yaml.")
    parser.add_argument("--output", type=Path, default=Path("one_dimension"))
    parser.add_argument("--target", action="store_true", help="Only print the target of the isolated point.")
    options = parser.parse_args()
    if options.target:
        without = leave_one_out(None, [[ISOLATED]], range(SEED_OF_TARGET, SEED_OF_TARGET + SEEDS))
        at_zero = without.measurements[0, :, len(GRID) // 2]
        print(f"{at_zero.mean():.3f} with a standard error of {at_zero.std() / SEEDS**0.5:.3f}")
        return
    attribution = answer(Ensemble.open(options.runs), options.output / "attribution")
    truth = leave_one_out(options.output / "truth")
    values = truth.baseline[:, QUERY], truth.measurements[..., QUERY]
    # named on one half of the seeds, and confirmed on the other
    chosen, fresh = (bootstrap(*(each[..., half::2] for each in values)) for half in (0, 1))
    firsts = {name: int(estimate.abs().argmax()) for name, (estimate, _) in chosen.items()}
    for name, (_, draws) in fresh.items():
        share = (draws.abs().argmax(1) == firsts[name]).double().mean()
        predicted = int(attribution.influence(name)[0].abs().argmax())
        print(f"first by {name}: {firsts[name]}, in {share:.3f} of draws of fresh seeds; predicted {predicted}")
    for example in firsts.values():
        for name, (estimate, draws) in fresh.items():
            low, high = interval(draws[:, example])
            real = f"{estimate[example]:.4f} [{low:.4f}, {high:.4f}]"
            print(f"without {example}: {name} {real}, predicted {attribution.influence(name)[0, example]:.4f}")
        pair = values[0][1::2, None].double(), values[1][example, 1::2, None].double()
        change = torch.stack([Spread()(*pair), *Spread().interval(*pair, 0.95)]).exp().flatten().tolist()
        print("    standard deviation times {:.2f} [{:.2f}, {:.2f}]".format(*change))
    found = bootstrap(*values)
    for name in found:
        for kind in ("pearson", "spearman"):
            score = correlate(attribution, truth, name, kind)
            shown = [score[key] for key in ("score", "low", "high", "ceiling")]
            print(name, kind, "{:.2f} [{:.2f}, {:.2f}], ceiling {:.2f}".format(*shown))
    picture = figure(attribution, truth, firsts, found)
    picture.write_html(options.output / "one_dimension.html", config={"displayModeBar": False})


if __name__ == "__main__":
    main()
