"""Score this library's estimators on the benchmark, and print the tables of the documentation.

    python -m ground_truth.leaderboard --work work

Records 20 runs of each task, with seeds that the truths do not have, and attributes the queries. Runs and attributions
are kept in the work directory. ``--output`` names a JSON file for all scores. ``--reference METHOD`` prints the
differences to a method too, with intervals.

Files ``work/TASK/outside/METHOD.safetensors`` are scored as well: the ``responses`` ``(models, queries, examples)`` of
any other method and, if they have the unit of the measurement, ``baseline`` ``(models, queries)``. ``outside.py`` lets
other packages write them.
"""

import argparse
import json
import logging
import math
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from examples.concrete import evaluation as concrete
from examples.concrete.concrete import ConcreteRegressor
from ground_truth.benchmark import TRUTHS, load, score
from ground_truth.make import mnist_trainer
from ground_truth.mnist.mnist import MNISTClassifier
from lightning_dtda import Ensemble, InfluenceFunctions, TrajectoryRecorder, UnrolledDifferentiation, attribute, record
from lightning_dtda.estimators import EKFAC, TRAK, GaussNewton, GradientDot, TracIn
from lightning_dtda.evaluation import Evaluation, compare

RUNS = 20
ESTIMATORS = {
    "UnrolledDifferentiation(horizon=None)": lambda: UnrolledDifferentiation(horizon=None),
    "UnrolledDifferentiation()": UnrolledDifferentiation,
    "GaussNewton()": lambda: InfluenceFunctions(GaussNewton()),
    "GaussNewton(damping=0.03)": lambda: InfluenceFunctions(GaussNewton(damping=0.03)),
    "EKFAC()": lambda: InfluenceFunctions(EKFAC()),
    "TRAK()": TRAK,
    "TracIn()": TracIn,
    "GradientDot()": GradientDot,
}
NO_UNIT = ("TRAK()", "GradientDot()")
"""Their responses have no unit, so that only the order of means is predicted."""

TRAININGS = {
    "concrete": (ConcreteRegressor, concrete.make_trainer, "prediction", 32),
    "mnist": (MNISTClassifier, mnist_trainer, "margin", 50),
}
DIFFERENCES = ("mean", "variance", "wasserstein")


def recorded(name: str, work: Path) -> Ensemble:
    """Return the runs of a task, of which the missing ones are recorded first."""
    task, (module, trainer, _, batch_size) = load(name), TRAININGS[name]

    def make():
        loader = torch.utils.data.DataLoader(task.train, batch_size, shuffle=True, drop_last=True)
        return trainer(), module(), loader

    record(make, TrajectoryRecorder(work / "runs"), RUNS, stacked="auto", progress=False)
    return Ensemble.open(work / "runs")[:RUNS]


def attributions(name: str, work: Path):
    """Yield names of estimators with responses ``(runs, queries, examples)`` and measurements ``(runs, queries)``."""
    task, (module, _, measurement, _) = load(name), TRAININGS[name]
    ensemble, scale = recorded(name, work), None
    for estimator, of in ESTIMATORS.items():
        found = attribute(
            ensemble,
            module(),
            task.train,
            queries=task.queries,
            measurement=measurement,
            estimator=of(),
            output=work / "attributions" / estimator.replace("(", "-").replace(")", ""),
        )
        scale = scale or found.responses[:].std()  # of the first one, which has a unit
        yield estimator, found.responses[:], None if estimator in NO_UNIT else found.baseline
    generator = torch.Generator().manual_seed(0)
    yield "random", torch.randn(found.responses.shape, generator=generator) * scale, found.baseline


def from_files(folder: Path) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """Yield names of files, with the responses and measurements that are in them."""
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        yield path.stem, tensors["responses"], tensors.get("baseline")


def shown(name: str) -> str:
    """Return a method's name as code, where it is some."""
    return f"`{name}`" if "(" in name else name


def by_mean(scores: dict[str, Evaluation]) -> list[tuple[str, Evaluation]]:
    """Return methods with their scores, the best for the mean first."""
    return sorted(scores.items(), key=lambda item: -item[1].scores["mean"].score)


def table(name: str, truth: str, scores: dict[str, Evaluation]) -> str:
    """Return a Markdown table."""
    best = max(scores.values(), key=lambda each: len(each.scores))
    lines = [f"| {name}, {truth} | mean | variance | Wasserstein |", "|---|---|---|---|"]
    for estimator, each in by_mean(scores):
        cells = [shown(estimator)]
        for difference in DIFFERENCES:
            one = each.scores.get(difference)
            cells.append("" if one is None else f"{one.score:.3f} [{one.low:.2f}, {one.high:.2f}]")
        lines.append(f"| {' | '.join(cells)} |")
    ceilings = [best.scores[difference].ceiling or math.nan for difference in DIFFERENCES]
    lines.append(f"| noise ceiling | {' | '.join(f'{ceiling:.3f}' for ceiling in ceilings)} |")
    return "\n".join(lines)


def differences(scores: dict[str, Evaluation], reference: str) -> str:
    """Return a Markdown table of scores less those of one method."""
    lines = [f"| less {shown(reference)} | mean | variance | Wasserstein |", "|---|---|---|---|"]
    for estimator, each in by_mean(scores):
        found = compare(each, scores[reference])
        ones = [found.get(difference) for difference in DIFFERENCES]
        cells = ["" if one is None else f"{one.gain:+.3f} [{one.low:+.3f}, {one.high:+.3f}]" for one in ones]
        lines.append(f"| {' | '.join([shown(estimator), *cells])} |")
    return "\n".join(lines)


def main() -> None:
    """Record, attribute, score and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", required=True, type=Path, help="a directory for runs and attributions")
    parser.add_argument("--task", choices=list(TRUTHS), action="append", help="all by default")
    parser.add_argument(
        "--reference", action="append", default=[], help="also print the differences to this method, such as 'EKFAC()'"
    )
    parser.add_argument("--output", type=Path, help="a JSON file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    content = {}
    for name in options.task or TRUTHS:
        truths, scores, work = load(name).truths, {}, options.work / name
        for method, *arrays in chain(attributions(name, work / "leaderboard"), from_files(work / "outside")):
            for size, truth in truths.items():
                scores.setdefault(size, {})[method] = score(truth, *arrays)
        for size, of_methods in scores.items():
            print(table(name, size, of_methods), end="\n\n", flush=True)
            for reference in (each for each in options.reference if each in of_methods):
                print(differences(of_methods, reference), end="\n\n", flush=True)
            content[f"{name}, {size}"] = {method: each.content() for method, each in of_methods.items()}
    if options.output is not None:
        options.output.write_text(json.dumps(content, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
