"""A constructed case in which the spread decides: records that are in the table twice, once with each label.

    python -m examples.coin_toss.pairs --output coin_toss

Eight rows are removed, for all undecided cases together: by ``coin_toss.py``'s methods, which take single rows, and by
those of them that use responses with each record as one removal. A record's response is the sum of its rows'.
"""

import argparse
import json
import logging
import warnings
from pathlib import Path

import torch

from examples.coin_toss.choices import choose, suggested
from examples.coin_toss.coin_toss import attributed, training
from examples.coin_toss.comparing import holm, interval, printed, resampled
from examples.coin_toss.flips import flip_rate, steadying, steadying_by_the_mean
from lightning_dtda import Attribution, retrain

ROWS, CASES, UNDECIDED = 8, 20, (0.05, 0.3)
"""Number of rows to remove and of cases to attribute, and flip rates of undecided cases: means that are not near 0."""

OURS, WHOLE = "variance, whole records", "the records of hospital B"
WAYS = {
    OURS: lambda attribution, k: suggested(attribution, "reduce_variance", k),
    "predicted flips, whole records": steadying,
    "mean, correct, whole records": lambda attribution, k: suggested(
        attribution, "improve_mean", k, lower_is_better=False
    ),
    "mean, majority, whole records": steadying_by_the_mean,
}


def of_records(attribution: Attribution, pairs: list[list[int]]) -> tuple[Attribution, list[list[int]]]:
    """Return the attribution with each pair of rows as one removal, and the rows of each removal."""
    trusted = attribution.trusted()
    responses, paired = torch.as_tensor(trusted.responses[:]), {row for pair in pairs for row in pair}
    units = [[row] for row in range(responses.shape[-1]) if row not in paired] + pairs
    summed = torch.stack([responses[..., unit].sum(-1) for unit in units], -1)
    return Attribution(trusted.baseline, summed, trusted.runs, trusted.queries), units


def whole(order: list[int], units: list[list[int]]) -> list[int]:
    """Return rows of removals in order, as far as they fit."""
    rows: list[int] = []
    for number in order:
        if len(rows) + len(units[number]) <= ROWS:
            rows += units[number]
    return rows


def measure(options, fold: int) -> dict | None:
    """Return margins of fresh seeds with and without the rows of each method, for one draw of the table."""
    root = options.output / f"conflicts-{fold}"
    make_trainer, make_module, data = training(Path(__file__).with_name("conflicts.yaml"), fold, 0.0)
    every = len(data.train) // data.hparams.batch_size
    make = make_trainer, make_module
    ensemble, _, attribution = attributed(root, make, data, options.runs, UNDECIDED, CASES)
    if attribution is None:
        return None
    several = choose(attribution, ensemble, make, data, every, ROWS, draws=3)
    pairs = data.pairs.tolist()
    by_record, units = of_records(attribution, pairs)
    several |= {name: [whole(way(by_record, ROWS), units)] for name, way in WAYS.items()}
    several[WHOLE] = [sorted(row for pair in pairs[: len(pairs) // 2] for row in pair)]
    without = [list(rows) for rows in dict.fromkeys(tuple(sorted(rows)) for each in several.values() for rows in each)]
    truth = retrain(
        make_module(), data, trainer=make_trainer, subsets=without, seeds=options.seeds, queries=data.held_out,
        measurement="margin", ensemble=ensemble, stacked=True, output=root / "truth", progress=False,
    )  # fmt: skip
    trusted = attribution.trusted()
    usual = flip_rate(trusted.baseline.double())
    return {
        "queries": list(attribution.queries),
        "before": truth.baseline.double(),
        "sizes": [ROWS],
        "after": {(name, ROWS): torch.stack([truth.measurements[without.index(sorted(rows))].double() for rows in each])
                  for name, each in several.items()},
        "predicted": {(name, ROWS): torch.stack([flip_rate(trusted.predict(rows).double()) for rows in each]).mean(0)
                      - usual for name, each in several.items()},
        "rows": several,
        "of hospital B": {name: len(set(each[0]) & set(several[WHOLE][0])) for name, each in several.items()},
    }  # fmt: skip


def main():
    """Measure, and print how flip rates change without the rows of each method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folds", type=int, nargs="+", default=[1, 2, 3], help="draws of the table")
    parser.add_argument("--runs", type=int, default=64, help="recorded seeds")
    parser.add_argument("--seeds", type=int, default=256, help="fresh seeds with and without the rows")
    parser.add_argument("--output", type=Path, default=Path("coin_toss"))
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "LightningCLI's args parameter")  # the options of this script are not the CLI's
    folds = [found for fold in options.folds if (found := measure(options, fold))]
    cases, results = sum(len(fold["queries"]) for fold in folds), {}
    samples = {name: resampled(folds, 0, name, "queries") for name in folds[0]["rows"]}
    for name, found in samples.items():
        keys = ("before", "flip rate", "by the mean", "by the spread", "accuracy", "predicted")
        row = results[name] = {key: interval(found[key], cases) for key in keys}
        row["ours minus this"] = interval(samples[OURS]["flip rate"] - found["flip rate"], cases)
        row["rows of hospital B"] = [fold["of hospital B"][name] for fold in folds]
    others = [name for name in results if name not in (OURS, WHOLE)]
    for name, p in zip(others, holm([results[name]["ours minus this"][3] for name in others]), strict=True):
        results[name]["adjusted p"] = p
    printed(results)
    (options.output / "conflicts.json").write_text(json.dumps(results | {"cases": cases}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
