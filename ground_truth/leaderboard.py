"""Score this library's estimators on the benchmark, and print the table of the documentation.

    python -m ground_truth.leaderboard --work work

Records 20 runs of each task, with seeds that the truths do not have, and attributes the queries. Runs and attributions
are kept in the work directory. ``--output`` names a JSON file for all scores.
"""

import argparse
import json
import logging
import math
from pathlib import Path

import torch

from examples.concrete import evaluation as concrete
from examples.concrete.concrete import ConcreteRegressor
from ground_truth.benchmark import TRUTHS, load, score
from ground_truth.make import mnist_trainer
from ground_truth.mnist.mnist import MNISTClassifier
from lightning_dtda import Ensemble, InfluenceFunctions, TrajectoryRecorder, UnrolledDifferentiation, attribute, record
from lightning_dtda.estimators import EKFAC, TRAK, GaussNewton, GradientDot, TracIn
from lightning_dtda.evaluation import Evaluation

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


def attributions(name: str, work: Path):
    """Yield names of estimators with responses ``(runs, queries, examples)`` and measurements ``(runs, queries)``."""
    task, (module, trainer, measurement, batch_size) = load(name), TRAININGS[name]

    def make():
        loader = torch.utils.data.DataLoader(task.train, batch_size, shuffle=True, drop_last=True)
        return trainer(), module(), loader

    record(make, TrajectoryRecorder(work / "runs"), RUNS, stacked="auto", progress=False)
    ensemble = Ensemble.open(work / "runs")[:RUNS]
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
        yield estimator, found.responses[:], found.baseline
    generator = torch.Generator().manual_seed(0)
    yield "random", torch.randn(found.responses.shape, generator=generator) * found.responses[:].std(), found.baseline


def table(name: str, truth: str, scores: dict[str, Evaluation]) -> str:
    """Return a Markdown table."""
    differences = ("mean", "variance", "wasserstein")
    best = max(scores.values(), key=lambda each: len(each.scores))
    lines = [f"| {name}, {truth} | mean | variance | Wasserstein |", "|---|---|---|---|"]
    for estimator, each in sorted(scores.items(), key=lambda item: -item[1].scores["mean"].score):
        cells = [f"`{estimator}`" if "(" in estimator else estimator]
        for difference in differences:
            one = each.scores.get(difference)
            cells.append("" if one is None else f"{one.score:.3f} [{one.low:.2f}, {one.high:.2f}]")
        lines.append(f"| {' | '.join(cells)} |")
    ceilings = [best.scores[difference].ceiling or math.nan for difference in differences]
    lines.append(f"| noise ceiling | {' | '.join(f'{ceiling:.3f}' for ceiling in ceilings)} |")
    return "\n".join(lines)


def main() -> None:
    """Record, attribute, score and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", required=True, type=Path, help="a directory for runs and attributions")
    parser.add_argument("--task", choices=list(TRUTHS), action="append", help="all by default")
    parser.add_argument("--output", type=Path, help="a JSON file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    content = {}
    for name in options.task or TRUTHS:
        truths, scores = load(name).truths, {}
        for estimator, responses, baseline in attributions(name, options.work / name / "leaderboard"):
            measured = None if estimator in NO_UNIT else baseline
            for size, truth in truths.items():
                scores.setdefault(size, {})[estimator] = score(truth, responses, measured)
        for size, of_estimators in scores.items():
            print(table(name, size, of_estimators), end="\n\n", flush=True)
            content[f"{name}, {size}"] = {estimator: each.content() for estimator, each in of_estimators.items()}
    if options.output is not None:
        options.output.write_text(json.dumps(content, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
