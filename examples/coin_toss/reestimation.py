"""Does it help to record anew after each batch of removals?

    python -m examples.coin_toss.reestimation --config examples/coin_toss/patients.yaml --noise 0.1 --output coin_toss

After ``coin_toss.py``, in its output directory: the rows that it chose all at once, one set for all undecided cases of
a quarter, are compared with as many that are chosen in batches. Before each further batch, the seeds are recorded anew
without the rows chosen so far, and attributed.
"""

import argparse
import json
import logging
import warnings
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Subset

from examples.coin_toss.choices import suggested
from examples.coin_toss.coin_toss import training
from examples.coin_toss.comparing import holm, interval, printed, resampled
from examples.coin_toss.flips import flip_rate, steadying
from lightning_dtda import Attribution, Ensemble, TrajectoryRecorder, attribute, record, retrain

WAYS = {"predicted flips": steadying, "variance": lambda attribution, k: suggested(attribution, "reduce_variance", k)}


def in_batches(root: Path, name: str, make, data, sizes: list[int]) -> tuple[list[int], torch.Tensor]:
    """Return the rows that a method chooses in batches, and the predicted flip rates without them ``(cases,)``."""
    make_trainer, make_module = make
    attribution, kept, chosen = Attribution.load(root / "attribution"), list(range(len(data.train))), []
    runs, cases = len(attribution.runs), Subset(data.held_out, attribution.queries)
    for number, size in enumerate(sizes):
        if number:
            kept = [row for row in range(len(data.train)) if row not in chosen]
            left = DataLoader(Subset(data.train, kept), data.hparams.batch_size, shuffle=True, drop_last=True)
            place = root / "anew" / f"{name}-{sum(sizes[:number])}".replace(" ", "-")
            recorder = TrajectoryRecorder(place / "runs", checkpoint_every=len(left))
            record(
                lambda left=left: (make_trainer(), make_module(), left), recorder, runs, stacked=True, progress=False
            )
            attribution = attribute(
                Ensemble.open(place / "runs"), make_module(), left, queries=cases, measurement="margin",
                output=place / "attribution", progress=False,
            )  # fmt: skip
        batch = WAYS[name](attribution, size)
        chosen += [kept[row] for row in batch]
    return chosen, flip_rate(attribution.trusted().predict(batch).double())


def measure(options, fold: int) -> dict | None:
    """Return margins of fresh seeds of one quarter with all rows and without those chosen in either way."""
    root = options.output / f"{options.config.stem}-noise-{options.noise}-fold-{fold}"
    if not (root / "rows.json").exists():
        return None
    make_trainer, make_module, data = training(options.config, fold, options.noise)
    size = max(1, round(options.share * len(data.train)))
    sizes = [len(part) for part in torch.arange(size).tensor_split(options.batches)]
    at_once = json.loads((root / "rows.json").read_text(encoding="utf-8"))
    if len(at_once["random"][0]) < size:
        raise SystemExit(f"{root} has fewer than {size} rows. Run coin_toss.py with --shares {options.share:g} first.")
    attribution = Attribution.load(root / "attribution").trusted()
    usual, queries = flip_rate(attribution.baseline.double()), list(attribution.queries)
    chosen, predicted = {}, {}
    for name in WAYS:
        rows = chosen[f"{name}, at once"] = at_once[name][0][:size]
        predicted[f"{name}, at once", size] = flip_rate(attribution.predict(rows).double()) - usual
        anew, without = in_batches(root, name, (make_trainer, make_module), data, sizes)
        chosen[f"{name}, in batches"], predicted[f"{name}, in batches", size] = anew, without - usual
    truth = retrain(
        make_module(), data, trainer=make_trainer, subsets=[sorted(rows) for rows in chosen.values()],
        seeds=options.seeds, queries=data.held_out, measurement="margin", ensemble=Ensemble.open(root / "runs"),
        stacked=True, output=root / "truth", progress=False,
    )  # fmt: skip
    return {
        "queries": queries,
        "before": truth.baseline.double(),
        "after": {(name, size): truth.measurements[n].double()[None] for n, name in enumerate(chosen)},
        "predicted": predicted,
        "sizes": [size],
        "rows": chosen,
    }


def main():
    """Measure, and print how the flip rate changes in each way and the difference, with their intervals."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--noise", type=float, default=0.0, help="share of the training labels that is made wrong")
    parser.add_argument("--folds", type=int, nargs="+", default=[1, 2, 3], help="quarters to hold out, one by one")
    parser.add_argument("--share", type=float, default=0.05, help="share of rows to remove")
    parser.add_argument("--batches", type=int, default=3, help="number of batches, the first one from the first runs")
    parser.add_argument("--seeds", type=int, default=256, help="fresh seeds with and without the rows")
    parser.add_argument("--output", type=Path, default=Path("coin_toss"))
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "LightningCLI's args parameter")  # the options of this script are not the CLI's
    folds = [found for fold in options.folds if (found := measure(options, fold))]
    if not folds:
        parser.exit(message=f"There is nothing in {options.output}: run coin_toss.py first.\n")
    cases, results = sum(len(fold["queries"]) for fold in folds), {}
    for name in WAYS:
        ways = [resampled(folds, 0, f"{name}, {way}", "queries") for way in ("in batches", "at once")]
        for way, found in zip(("in batches", "at once"), ways, strict=True):
            keys = ("flip rate", "predicted", "by the mean", "by the spread", "accuracy")
            results[f"{name}, {way}"] = {key: interval(found[key], cases) for key in keys}
        difference = interval(ways[0]["flip rate"] - ways[1]["flip rate"], cases)
        results[f"{name}, in batches"]["minus at once"] = difference
        same = [set(fold["rows"][f"{name}, at once"]) & set(fold["rows"][f"{name}, in batches"]) for fold in folds]
        results[f"{name}, in batches"]["same rows"] = sum(map(len, same)) / len(folds)
    adjusted = holm([results[f"{name}, in batches"]["minus at once"][3] for name in WAYS])
    for name, p in zip(WAYS, adjusted, strict=True):
        results[f"{name}, in batches"]["adjusted p"] = p
    printed(results)
    path = options.output / f"{options.config.stem}-noise-{options.noise}-reestimation.json"
    path.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
