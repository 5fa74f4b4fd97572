"""Which training rows make this decision a coin toss?

    python -m examples.coin_toss.coin_toss --config examples/coin_toss/patients.yaml --noise 0.1 --output coin_toss

For each held-out quarter: record seeds, find the cases whose decision depends on the seed, attribute their margins,
choose rows to leave out, and train fresh seeds on everything and without the rows of each method. Runs, attributions
and retrainings are kept in the output directory; another call continues where the first one stopped.
"""

import argparse
import json
import logging
import warnings
from itertools import chain
from pathlib import Path

import torch
from lightning.pytorch.cli import LightningCLI
from torch import Tensor
from torch.func import functional_call
from torch.utils.data import Subset

from examples.coin_toss.choices import EACH, choose, for_each_case, kept
from examples.coin_toss.comparing import holm, interval, minority, printed, resampled
from examples.coin_toss.figure import draw
from examples.coin_toss.flips import FlipRate, flip_rate
from lightning_dtda import Ensemble, TrajectoryRecorder, attribute, record, retrain

OURS = "predicted flips"
BASELINES = ("variance", "mean, correct", "mean, majority", "cleanlab", "AUM", "data map", "random")


def training(config, fold: int, noise: float):
    """Return functions that make a Trainer and a module, and the data module."""
    arguments = [f"--config={config}", f"--data.init_args.fold={fold}"]
    arguments += [f"--data.init_args.noise={noise}"] if noise else []
    cli = LightningCLI(args=arguments, run=False, save_config_callback=None, seed_everything_default=False)
    cli.datamodule.setup("fit")
    return cli.instantiate_trainer, lambda: type(cli.model)(**vars(cli.config.model.init_args)), cli.datamodule


def margins(ensemble, module, cases) -> Tensor:
    """Return the margins of cases by recorded runs ``(runs, cases)``; a decision is right if its margin is positive."""
    inputs, labels = cases.tensors
    scores = torch.stack([functional_call(module, run.theta(run.steps), (inputs,)) for run in ensemble]).detach()
    return (scores[..., 1] - scores[..., 0]) * (2 * labels - 1)


def attributed(root: Path, make, data, runs: int, between: tuple[float, float], most: int):
    """Record runs, and attribute the margins of cases whose decision depends on the seed.

    Args:
        root: Directory for runs and attribution.
        make: Functions that make a Trainer and a module.
        data: The data module.
        runs: Number of seeds to record.
        between: Lowest and highest flip rate of an undecided case.
        most: Maximum number of cases to attribute.

    Returns:
        The ensemble, flip rates of all held-out cases ``(cases,)``, and the attribution, ``None`` if none is undecided.
    """
    make_trainer, make_module = make
    recorder = TrajectoryRecorder(root / "runs", checkpoint_every=len(data.train) // data.hparams.batch_size)
    record(lambda: (make_trainer(), make_module(), data), recorder, runs, stacked=True, progress=False)
    ensemble = Ensemble.open(root / "runs")
    shares = minority((margins(ensemble, make_module(), data.held_out) > 0).double().mean(0))
    undecided = ((shares >= between[0]) & (shares <= between[1])).nonzero()[:, 0].tolist()  # in random order
    print(f"{root.name}: {len(undecided)} of {len(shares)} cases are undecided, at most {most} attributed", flush=True)
    if not undecided:
        return ensemble, shares, None
    attribution = attribute(
        ensemble, make_module(), data, queries=Subset(data.held_out, undecided[:most]), measurement="margin",
        output=root / "attribution", progress=False,
    )  # fmt: skip
    return ensemble, shares, attribution


def measure(options, fold: int) -> dict | None:
    """Return what one quarter shows: margins of fresh seeds with and without rows. ``None`` if no case is undecided."""
    root = options.output / f"{options.config.stem}-noise-{options.noise}-fold-{fold}"
    make_trainer, make_module, data = training(options.config, fold, options.noise)
    every = len(data.train) // data.hparams.batch_size
    make = make_trainer, make_module
    ensemble, shares, attribution = attributed(root, make, data, options.runs, options.undecided, options.cases)
    if attribution is None:
        return None
    queries = list(attribution.queries)
    wrong = set(data.wrong.tolist())
    sizes = [max(1, round(share * len(data.train))) for share in options.shares]
    asked = max(sizes), options.draws
    rows = kept(root / "rows.json", *asked, lambda: choose(attribution, ensemble, make, data, every, *asked))
    sets = {(name, k): [sorted(each[:k]) for each in several] for name, several in rows.items() for k in sizes}
    # for each decision on its own, as few rows as the smallest share
    each_case = for_each_case(attribution, sizes[0])
    # sets that several methods choose are retrained without once
    without = list(dict.fromkeys(tuple(sorted(each)) for each in chain(*each_case.values(), *sets.values())))
    truth = retrain(
        make_module(), data, trainer=make_trainer, subsets=without, seeds=options.seeds, queries=data.held_out,
        measurement="margin", ensemble=ensemble, stacked=True, output=root / "truth", progress=False,
    )  # fmt: skip

    def retrained(rows):
        return truth.measurements[without.index(tuple(sorted(rows)))].double()

    after = {key: torch.stack([retrained(each) for each in several]) for key, several in sets.items()}
    trusted = attribution.trusted()
    usual = flip_rate(trusted.baseline.double())
    predicted = {
        key: torch.stack([flip_rate(trusted.predict(each).double()) for each in several]).mean(0) - usual
        for key, several in sets.items()
    }
    for name, several in each_case.items():
        after[name, sizes[0]] = own = torch.full((1, options.seeds, len(shares)), torch.nan, dtype=torch.float64)
        predicted[name, sizes[0]] = change = -usual
        for n, (rows, query) in enumerate(zip(several, queries, strict=True)):
            own[0, :, query] = retrained(rows)[:, query]
            change[n] += flip_rate(trusted.predict(rows).double())[n]
    return {
        "queries": queries,
        "rest": [n for n in range(len(shares)) if n not in queries],
        "before": truth.baseline.double(),
        "after": after,
        "predicted": predicted,
        "sizes": sizes,
        "wrong": {key: [len(wrong & set(each)) for each in several]
                  for key, several in (sets | {(name, sizes[0]): each for name, each in each_case.items()}).items()},
        "significant": {d: attribution.significant(FlipRate() if d == "flip rate" else d).sum(1).tolist()
                        for d in ("flip rate", "spread", "mean")},
        "alone": [{"query": query, "share": float(shares[query]), "rows": rows, "margins": margins}
                  for query, rows, margins in zip(queries, each_case[EACH[0]],
                                                  after[EACH[0], sizes[0]][0, :, queries].T, strict=True)],
        "data": data,
    }  # fmt: skip


def summarise(folds: list[dict], shares: list[float]) -> dict:
    """Print and return all statistics with their intervals, and how the flip rate compares with each baseline."""
    results = {}
    cases = sum(len(fold["queries"]) for fold in folds)
    tests = {d: sum(sum(fold["significant"][d]) for fold in folds) / cases for d in folds[0]["significant"]}
    print(f"{cases} undecided cases; significant rows for each: " + ", ".join(f"{d} {n:.1f}" for d, n in tests.items()))
    for step, share in enumerate(shares):
        # the methods that are compared with others: for all cases together and, with the fewest rows, for each
        compared = {OURS: BASELINES} | ({EACH[0]: (*EACH[1:], *BASELINES)} if step == 0 else {})
        names = (OURS, *(EACH if step == 0 else ()), *BASELINES)
        samples = {name: resampled(folds, step, name, "queries") for name in names}
        for name, found in samples.items():
            found["predicted minus real"] = found["predicted"] - found["flip rate"]
            row = {key: interval(values, cases) for key, values in found.items()}
            if name not in EACH:  # on other cases, it is as many methods as there are cases
                others, number = resampled(folds, step, name, "rest"), sum(len(fold["rest"]) for fold in folds)
                row |= {f"others' {key}": interval(others[key], number) for key in ("before", "flip rate", "accuracy")}
            counts = [fold["wrong"][name, fold["sizes"][step]] for fold in folds]
            row["wrong labels"] = sum(sum(each) / len(each) for each in counts) / len(folds)
            for ours in compared:
                row[f"{ours} minus this"] = interval(samples[ours]["flip rate"] - found["flip rate"], cases)
            results[f"{share:g} {name}"] = row
        for ours, others in compared.items():
            adjusted = holm([results[f"{share:g} {name}"][f"{ours} minus this"][3] for name in others])
            for name, p in zip(others, adjusted, strict=True):
                results[f"{share:g} {name}"][f"adjusted p, {ours}"] = p
    printed(results)
    return results | {"cases": cases, "significant rows": tests}


def main():
    """Measure, print the figures with their intervals, and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--noise", type=float, default=0.0, help="share of the training labels that is made wrong")
    parser.add_argument("--folds", type=int, nargs="+", default=[1, 2, 3], help="quarters to hold out, one by one")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.01, 0.02, 0.05], help="shares of rows to remove")
    parser.add_argument("--runs", type=int, default=64, help="recorded seeds")
    parser.add_argument("--seeds", type=int, default=256, help="fresh seeds with and without the rows")
    parser.add_argument("--undecided", type=float, nargs=2, default=[0.1, 0.5], help="flip rates of undecided cases")
    # each costs three sets of fresh seeds: the rows chosen for it alone by three methods
    parser.add_argument("--cases", type=int, default=20, help="maximum number of cases of a quarter to attribute")
    parser.add_argument("--draws", type=int, default=3, help="random sets of rows")
    parser.add_argument("--output", type=Path, default=Path("coin_toss"))
    options = parser.parse_args()
    options.shares.sort()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "LightningCLI's args parameter")  # the options of this script are not the CLI's
    folds = [found for fold in options.folds if (found := measure(options, fold))]
    if not folds:
        parser.exit(message="No case is undecided.\n")
    results = summarise(folds, options.shares)
    name = f"{options.config.stem}-noise-{options.noise}"
    (options.output / f"{name}.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    draw(folds[0], results, (OURS, *EACH, *BASELINES), options.shares).write_html(
        options.output / f"{name}.html", config={"displayModeBar": False}
    )


if __name__ == "__main__":
    main()
