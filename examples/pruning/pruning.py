"""Leave out a tenth of the training images, chosen by many seeds or by one: does accuracy rise?

As in figure 6 of Mlodozeniec et al. (arXiv 2506.12965). Removed are those images whose removal is predicted to lower
the validation loss most, in the mean over recorded runs or in a single one; random ones; or those that cleanlab finds
mislabelled. Each choice is trained again with the same fresh seeds, and measured on test images.

    python -m examples.pruning.pruning --output pruning
"""

import argparse
import logging
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import torch
from cleanlab.rank import get_label_quality_scores
from lightning.pytorch import seed_everything
from lightning.pytorch.cli import LightningCLI
from plotly.subplots import make_subplots
from scipy import stats
from torch.utils.data import DataLoader, Subset

from examples.pruning.vision import CLASSES
from examples.pruning.whole import FIGURES, Whole, measure
from lightning_dtda import Ensemble, InfluenceFunctions, TrajectoryRecorder, attribute, record, retrain
from lightning_dtda.estimators import EKFAC

RUNS, FIXED, RANDOM, FRESH, FOLDS = 8, 3, 2, 10, 5
"""Recorded runs; of these, how many choose on their own; random sets; fresh seeds; folds of the cross-validation."""

PAIRS = (
    ("mean over runs", "nothing"),
    ("mean over runs", "random"),
    ("mean over runs", "one run"),
    ("mean over runs", "cleanlab"),
    ("one run", "random"),
)
COLOURS = {"random": "#999999", "one run": "#e69f00", "mean over runs": "#0072b2", "cleanlab": "#009e73"}


def configured(config, noise, accelerator):
    """Return a new Trainer, module and data module of a configuration."""
    arguments = [f"--config={config}", f"--data.init_args.noise={noise}"]
    arguments += [f"--trainer.accelerator={accelerator}"] if accelerator else []
    cli = LightningCLI(args=arguments, run=False, seed_everything_default=False, save_config_callback=None)
    return cli.trainer, cli.model, cli.datamodule


def out_of_sample(make, data, path):
    """Return class probabilities ``(N, classes)`` of each training image, by models that were trained without it."""
    if path.exists():
        return torch.load(path)
    images, labels = data.plain.tensors
    folds, probabilities = torch.arange(len(labels)) % FOLDS, torch.empty(len(labels), CLASSES)
    for fold in range(FOLDS):
        seed_everything(1000 + fold, verbose=False)
        trainer, module, _ = make()
        kept = Subset(data.train, torch.nonzero(folds != fold).flatten().tolist())
        trainer.fit(module, DataLoader(kept, data.hparams.batch_size, shuffle=True))
        with torch.no_grad():
            parts = images[folds == fold].split(500)
            probabilities[folds == fold] = torch.cat([module.cpu().eval()(part).softmax(1) for part in parts])
    torch.save(probabilities, path)
    return probabilities


def choose(make, data, output, share, runs):
    """Return sets of images to remove, by name: in the mean over runs, by single runs, at random, by cleanlab."""
    recorder = TrajectoryRecorder(output / "runs", batches="store")
    if failures := record(make, recorder, runs, progress=False):
        raise RuntimeError(failures)
    attribution = attribute(
        Ensemble.open(output / "runs"),
        make()[1],
        data.plain,
        queries=Whole(data.validation, ["loss"]),
        measurement=measure,
        estimator=InfluenceFunctions(EKFAC()),
        output=output / "attribution",
    )
    generator, count = np.random.default_rng(0), round(share * len(data.train))
    # an influence is the change of the loss by the removal: the lowest are best to remove
    sets = {"mean over runs 0": attribution.influence("mean")[0].argsort()[:count].tolist()}
    for run in range(min(FIXED, runs)):
        sets[f"one run {run}"] = attribution.responses[run, 0].argsort()[:count].tolist()
    for draw in range(RANDOM):
        sets[f"random {draw}"] = sorted(generator.choice(len(data.train), count, replace=False).tolist())
    probabilities = out_of_sample(make, data, output / "probabilities.pt").double().numpy()
    probabilities /= probabilities.sum(1, keepdims=True)  # up to the rounding of float64
    scores = get_label_quality_scores(data.plain.tensors[1].numpy(), probabilities)
    sets["cleanlab 0"] = np.argsort(scores)[:count].tolist()
    return sets


def outcomes(make, data, sets, output, fresh):
    """Return loss and error rate of retrained models by set of removed images, each ``(seeds, figures)``."""
    truth = retrain(
        lambda: make()[1],
        data,
        trainer=lambda: make()[0],
        subsets=list(sets.values()),
        seeds=fresh,
        queries=Whole(data.test, FIGURES),
        measurement=measure,
        stacked=False,  # nor could it be: random shifts
        output=output / "truth",
        progress=False,
    )
    removed = dict(zip(sets, truth.measurements.double().numpy(), strict=True))
    return {"nothing 0": truth.baseline.double().numpy(), **removed}


def interval(differences):
    """Return the mean of paired differences, half the width of its 95 % interval, and the p-value of no difference."""
    test = stats.ttest_1samp(differences, 0.0)
    return differences.mean(), test.confidence_interval().high - differences.mean(), test.pvalue


def holm(pvalues):
    """Return Holm's adjusted p-values."""
    order = np.argsort(pvalues)
    stepped = np.array(pvalues)[order] * np.arange(len(pvalues), 0, -1)
    return np.minimum(np.maximum.accumulate(stepped), 1.0)[np.argsort(order)]


def show(noise, data, sets, measured):
    """Print the tables of a setting."""
    print(f"\nwrong labels: {noise:.0%} of {len(data.train)}")
    for name, values in measured.items():
        removed = sets.get(name, [])
        common = len(set(removed) & set(sets["mean over runs 0"]))
        loss, error = values.mean(0)
        print(
            f"{name:18} accuracy {100 - 100 * error:6.2f} %  loss {loss:.4f}  wrong labels removed "
            f"{int(data.wrong[removed].sum()):3} of {len(removed)}, shared with the mean's set {common}"
        )
    of = {}  # averaged over the sets of each way of choosing
    for choice in ("nothing", *COLOURS):
        of[choice] = np.mean([values for name, values in measured.items() if name.startswith(choice)], 0)
    rows = [interval(values) for one, other in PAIRS for values in (of[one] - of[other]).T]
    adjusted = holm([row[2] for row in rows])  # over both figures of all pairs
    for index, (one, other) in enumerate(PAIRS):
        (loss, half, _), (error, wide, _) = rows[2 * index : 2 * index + 2]
        print(
            f"{one} - {other}: accuracy {-100 * error:+.2f} ± {100 * wide:.2f} points "
            f"(p {adjusted[2 * index + 1]:.2g}), loss {loss:+.4f} ± {half:.4f} (p {adjusted[2 * index]:.2g})"
        )


def draw(results):
    """Draw what each set does to accuracy and loss: dots are fresh seeds, diamonds their mean with its interval."""
    titles = [f"{figure}, {noise:.0%} of the labels wrong" for noise in results for figure in ("accuracy", "loss")]
    plot = make_subplots(len(results), 2, subplot_titles=titles, shared_yaxes=True, vertical_spacing=0.2)
    for row, measured in enumerate(results.values(), 1):
        for name, values in list(measured.items())[:0:-1]:
            choice, number = name.rsplit(" ", 1)
            label = f"{choice} (seed {number})" if choice == "one run" else choice + " " * int(number)
            for column, scale in ((1, -100), (2, 1)):
                change = scale * (values - measured["nothing 0"])[:, 2 - column]
                mean, half, _ = interval(change)
                place = {"row": row, "col": column, "showlegend": False, "mode": "markers"}
                colour = COLOURS[choice]
                plot.add_scatter(x=change, y=[label] * len(change), marker={"color": colour, "opacity": 0.35}, **place)
                marker = {"color": colour, "size": 11, "symbol": "diamond", "line": {"width": 1, "color": "black"}}
                bar = {"array": [half], "color": "black", "thickness": 2}
                plot.add_scatter(x=[mean], y=[label], marker=marker, error_x=bar, **place)
    plot.add_vline(0, line_color="black", line_width=1)
    plot.update_xaxes(title_text="change of the test accuracy in points", col=1)
    plot.update_xaxes(title_text="change of the test loss in nats", col=2)
    return plot.update_layout(template="plotly_white", width=1100, height=330 * len(results) + 60, margin={"t": 60})


def main():
    """Record, choose, retrain, print and draw; what is on disk is used."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=Path(__file__).with_name("config.yaml"))
    parser.add_argument("--output", type=Path, default=Path("pruning"))
    parser.add_argument("--noise", type=float, nargs="+", default=[0.15, 0.0], help="shares of labels to change")
    parser.add_argument("--share", type=float, default=0.1, help="share of the images that is removed")
    parser.add_argument("--accelerator", help="'gpu', for example; as configured by default")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", module="lightning.pytorch")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    results = {}
    for noise in options.noise:
        make, output = partial(configured, options.config, noise, options.accelerator), options.output / f"{noise:g}"
        data = make()[2]
        data.setup("fit")
        output.mkdir(parents=True, exist_ok=True)
        sets = choose(make, data, output, options.share, RUNS)
        results[noise] = outcomes(make, data, sets, output, FRESH)
        show(noise, data, sets, results[noise])
    draw(results).write_html(options.output / "pruning.html", config={"displayModeBar": False})


if __name__ == "__main__":
    main()
