"""Which estimator predicts retraining best? Five trainings of different kinds, and a rule that was fixed beforehand.

    python -m benchmarks.defaults --output defaults --concrete concrete.txt --mnist mnist10k

Each task records 20 runs and retrains without each of 32 random tenths of the data ("drop": the rows are deleted, the
seeds are new). All estimators predict these retrainings from the same runs. For the mean, the variance and the
Wasserstein distance, the score is the linear datamodeling score with its interval; its difference from the score of
exact unrolling has an interval of its own. ``size`` is the slope of the real on the predicted shift of the mean over
the subsets, in the median over queries: 1 if predicted shifts have the right size. ``cost`` is the CPU time of one
``attribute`` relative to that of recording the runs with the Trainer; an average of two costs what both cost.

The rule: every estimator is ranked by its score in each task and difference, and the best mean rank wins. Another one
ties with the winner if, for each difference, the interval of the winner's lead, averaged over the tasks, contains zero.
Of those that tie, the cheapest is chosen: of all, and of those that are a single estimator.

Two tasks need data by path and are left out without it: UCI Concrete as text, and a directory with MNIST's test images
and labels. The others use scikit-learn's digits. Everything is kept in the output; another call continues.
"""

import argparse
import json
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from benchmarks.chaotic_runs import Classifier, read
from examples.concrete.concrete import ConcreteData, ConcreteRegressor
from lightning_dtda import (
    Attribution,
    Ensemble,
    GroundTruth,
    InfluenceFunctions,
    TrajectoryRecorder,
    UnrolledDifferentiation,
    attribute,
    record,
    retrain,
)
from lightning_dtda.estimators import EKFAC, Estimator, GaussNewton
from lightning_dtda.evaluation import Evaluation, compare, evaluate
from lightning_dtda.retraining import random_subsets

RUNS, SUBSETS, KEPT = 20, 32, 0.9
DIFFERENCES = ("mean", "variance", "wasserstein")

ESTIMATORS: dict[str, Callable[[], Estimator]] = {
    "exact": lambda: UnrolledDifferentiation(horizon=None),
    "horizon": UnrolledDifferentiation,
    "Gauss-Newton": InfluenceFunctions,
    "EK-FAC": lambda: InfluenceFunctions(EKFAC()),
    "preconditioned": lambda: InfluenceFunctions(GaussNewton("cg", iterations=6, preconditioner=EKFAC())),
}
SHORT = ("adamw-1", "adamw-3", "sgd-1", "sgd-3")
"""Tasks of few epochs, added after the rule had been applied, which they have no part in."""

AVERAGES = [(one, other) for one in ("exact", "horizon") for other in ("Gauss-Newton", "EK-FAC")]


class Digits(pl.LightningModule):
    """A classifier of 8 x 8 digits, trained on the cross entropy.

    Args:
        make: Function that creates the network.
        optimizer: Function that creates the optimizer of its parameters.
    """

    def __init__(self, make: Callable[[], nn.Module], optimizer: Callable[..., torch.optim.Optimizer]) -> None:
        super().__init__()
        self.net, self.optimizer = make(), optimizer

    def forward(self, images: Tensor) -> Tensor:
        """Return class scores ``(B, 10)``."""
        return self.net(images)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the cross entropy."""
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer."""
        return self.optimizer(self.parameters())


class Rows(nn.Module):
    """A transformer that reads a digit's eight rows as a sequence."""

    def __init__(self, width: int = 16, layers: int = 1) -> None:
        super().__init__()
        self.embed, self.place = nn.Linear(8, width), nn.Parameter(torch.randn(8, width) / 4)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True) for _ in range(layers)
        )
        self.classify = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return class scores ``(B, 10)`` of images ``(B, 64)``."""
        hidden = self.embed(images.unflatten(1, (8, 8))) + self.place
        for layer in self.layers:
            hidden = layer(hidden)
        return self.classify(hidden.mean(1))


def mlp() -> nn.Module:
    """64-32-10, ReLU."""
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def cnn() -> nn.Module:
    """Two convolutions with BatchNorm."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        *(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(64, 10)),
    )


def adamw(parameters) -> torch.optim.Optimizer:
    """AdamW with its defaults but the rate."""
    return torch.optim.AdamW(parameters, lr=3e-3)


def plain(parameters) -> torch.optim.Optimizer:
    """SGD."""
    return torch.optim.SGD(parameters, lr=0.1)


def momentum(parameters) -> torch.optim.Optimizer:
    """SGD with momentum."""
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


@dataclass(frozen=True)
class Task:
    """A training, and what is asked about it.

    Args:
        what: The training in words.
        module: Function that creates the module.
        train: Training examples.
        asked: Queries.
        measurement: Measurement m.
        batch: Batch size.
        length: ``max_steps`` or ``max_epochs`` of the Trainer.
        seeds: Number of retrainings of each subset: fewer where they cannot be stacked.
    """

    what: str
    module: Callable[[], pl.LightningModule]
    train: Dataset
    asked: Dataset
    measurement: str
    batch: int
    length: dict[str, int]
    seeds: int

    def loader(self) -> DataLoader:
        """Return shuffled batches."""
        return DataLoader(self.train, self.batch, shuffle=True)

    def trainer(self) -> pl.Trainer:
        """Return a Trainer that only trains."""
        quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        return pl.Trainer(**self.length, accelerator="cpu", **dict.fromkeys(quiet, False))


def tasks(concrete: str | None, mnist: str | None) -> dict[str, Task]:
    """Return the tasks that there are data for."""
    found = {}
    if concrete is not None:
        data = ConcreteData(concrete)
        data.setup("fit")
        asked, what = Subset(data.validation, range(20)), "UCI Concrete, MLP, SGD"
        found["concrete"] = Task(what, ConcreteRegressor, data.train, asked, "loss", 32, {"max_steps": 1500}, 96)
    if mnist is not None:
        images, labels = read(mnist)
        train, asked = (TensorDataset(images[part], labels[part]) for part in (slice(2000), slice(2000, 2010)))
        found["mnist"] = Task("MNIST, MLP, AdamW", Classifier, train, asked, "margin", 64, {"max_epochs": 20}, 16)
    images, labels = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    pixels, labels = images[order].float() / 8 - 1, labels[order]
    train, asked = (TensorDataset(pixels[part], labels[part]) for part in (slice(600), slice(600, 612)))
    for name, what, make, optimizer, batch, epochs, seeds in (
        ("mlp", "digits, MLP, AdamW", mlp, adamw, 50, 20, 64),
        ("cnn", "digits, CNN with BatchNorm, SGD with momentum", cnn, momentum, 50, 10, 14),
        ("transformer", "digits, transformer, AdamW", Rows, adamw, 50, 8, 32),
        *((f"adamw-{epochs}", f"digits, MLP, AdamW, {epochs} epochs", mlp, adamw, 10, epochs, 48) for epochs in (1, 3)),
        *((f"sgd-{epochs}", f"digits, MLP, SGD, {epochs} epochs", mlp, plain, 10, epochs, 48) for epochs in (1, 3)),
    ):

        def module(make=make, optimizer=optimizer) -> pl.LightningModule:
            return Digits(make, optimizer)

        some = Subset(asked, range(8)) if name == "transformer" else asked
        found[name] = Task(what, module, train, some, "margin", batch, {"max_epochs": epochs}, seeds)
    return found


def truth(task: Task, directory: Path, ensemble: Ensemble) -> GroundTruth:
    """Retrain what is missing."""
    return retrain(
        task.module,
        task.loader(),
        trainer=task.trainer,
        subsets=random_subsets(len(task.train), SUBSETS, KEPT),
        seeds=task.seeds,
        queries=task.asked,
        measurement=task.measurement,
        ensemble=ensemble,
        output=directory / "truth",
        progress=False,
    )


def answers(task: Task, directory: Path, ensemble: Ensemble) -> dict[str, Attribution]:
    """Attribute with every estimator, and add the averages; CPU seconds go to ``seconds.json``."""
    found = {}
    for name, make in ESTIMATORS.items():
        path = directory / "attributions" / name
        if name not in seconds(directory):
            started = time.process_time()
            question = {"queries": task.asked, "measurement": task.measurement, "progress": False}
            attribute(ensemble, task.module(), task.train, estimator=make(), output=path, overwrite=True, **question)
            note(directory, name, time.process_time() - started)
        loaded = Attribution.load(path)
        found[name] = replace(loaded, responses=loaded.responses[:])
    for one, other in AVERAGES:
        responses = [found[name].responses.double() for name in (one, other)]
        for what, factor in (("", 1.0), (", scaled", norms(responses[0]) / norms(responses[1]))):
            found[f"{one} + {other}{what}"] = replace(found[one], responses=(responses[0] + factor * responses[1]) / 2)
    return found


def norms(responses: Tensor) -> Tensor:
    """Return the norm of each query's responses over runs and examples ``(1, queries, 1)``."""
    return responses.square().sum((0, 2), keepdim=True).sqrt()


def seconds(directory: Path) -> dict[str, float]:
    """Return the CPU seconds of what has been done in a directory."""
    path = directory / "seconds.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def note(directory: Path, name: str, taken: float) -> None:
    """Add CPU seconds."""
    content = json.dumps(seconds(directory) | {name: taken}, indent=1)
    (directory / "seconds.json").write_text(content, encoding="utf-8")
    print(f"{directory.name}: {name}, {taken:.0f} CPU s", flush=True)


def size(attribution: Attribution, truth: GroundTruth) -> float:
    """Return the slope of real on predicted shifts of the mean over the subsets, in the median over queries."""
    predicted = torch.stack([attribution.influence("mean", removed=removed) for removed in truth.removed], 1)
    real = truth.influence("mean")
    predicted, real = (shift - shift.mean(1, keepdim=True) for shift in (predicted, real))
    return float(((predicted * real).sum(1) / predicted.square().sum(1)).median())


def recorded(task: Task, directory: Path) -> Ensemble:
    """Record the missing runs with the Trainer."""
    if "recording" not in seconds(directory):
        started = time.process_time()
        recorder = TrajectoryRecorder(directory / "runs")
        record(lambda: (task.trainer(), task.module(), task.loader()), recorder, RUNS, progress=False)
        note(directory, "recording", time.process_time() - started)
    return Ensemble.open(directory / "runs")


def cost(name: str, taken: dict[str, float]) -> float:
    """Return the CPU time of an estimator, or of both that are averaged, relative to recording."""
    return sum(taken[part] for part in name.removesuffix(", scaled").split(" + ")) / taken["recording"]


@dataclass(frozen=True)
class Result:
    """What was found in a task: evaluations, sizes and costs by name of the estimator."""

    evaluations: dict[str, Evaluation]
    sizes: dict[str, float]
    costs: dict[str, float]


def examine(task: Task, directory: Path) -> Result:
    """Record, retrain, attribute and evaluate."""
    ensemble = recorded(task, directory)
    of_all, real = answers(task, directory, ensemble), truth(task, directory, ensemble)
    evaluations = {name: evaluate(attribution, real, DIFFERENCES) for name, attribution in of_all.items()}
    taken = seconds(directory)
    return Result(
        evaluations,
        {name: size(attribution, real) for name, attribution in of_all.items()},
        {name: cost(name, taken) for name in of_all},
    )


def table(task: Task, result: Result) -> str:
    """Return scores, intervals, and differences from exact unrolling as a Markdown table."""
    ceilings = (result.evaluations["exact"].scores[difference].ceiling for difference in DIFFERENCES)
    lines = [
        f"### {task.what}: {task.measurement}, {RUNS} runs, {SUBSETS} tenths, {task.seeds} retrainings each",
        "| estimator | " + " | ".join(f"{name} | against exact" for name in DIFFERENCES) + " | size | cost |",
        "|---|" + "---|" * (2 * len(DIFFERENCES) + 2),
    ]
    for name, evaluation in result.evaluations.items():
        gains, cells = compare(evaluation, result.evaluations["exact"]), []
        for difference in DIFFERENCES:
            score, gain = evaluation.scores[difference], gains[difference]
            cells.append(f"{score.score:.2f} [{score.low:.2f}, {score.high:.2f}]")
            cells.append("" if name == "exact" else f"{gain.gain:+.2f} [{gain.low:+.2f}, {gain.high:+.2f}]")
        lines.append(f"| {name} | {' | '.join(cells)} | {result.sizes[name]:.2f} | {result.costs[name]:.2f} |")
    shown = " | ".join("unknown | " if ceiling is None else f"{ceiling:.2f} | " for ceiling in ceilings)
    return "\n".join([*lines, f"| noise ceiling | {shown} | | |"])


def lead(results: dict[str, Result], first: str, second: str, difference: str) -> tuple[float, float, float]:
    """Return by how much the first estimator leads, averaged over independent tasks, with its 95 % interval."""
    gains = [compare(found.evaluations[first], found.evaluations[second])[difference] for found in results.values()]
    mean = statistics.fmean(gain.gain for gain in gains)
    half = sum(((gain.high - gain.low) / 2) ** 2 for gain in gains) ** 0.5 / len(gains)
    return mean, mean - half, mean + half


def verdict(results: dict[str, Result], names: Sequence[str]) -> str:
    """Apply the rule to these estimators; return ranks, the winner's leads, costs and the choice as a table."""
    places: dict[str, list[int]] = {name: [] for name in names}
    for found in results.values():
        for difference in DIFFERENCES:
            order = sorted(names, key=lambda name: -found.evaluations[name].scores[difference].score)
            for place, name in enumerate(order, 1):
                places[name].append(place)
    ranks = {name: statistics.fmean(of_name) for name, of_name in places.items()}
    costs = {name: statistics.geometric_mean(found.costs[name] for found in results.values()) for name in names}
    best, ties = min(names, key=ranks.__getitem__), []
    lines = [
        f"| estimator | mean rank | {' | '.join(f'{best} leads, {difference}' for difference in DIFFERENCES)} | cost |",
        "|---|" + "---|" * (len(DIFFERENCES) + 2),
    ]
    for name in sorted(names, key=ranks.__getitem__):
        leads = [lead(results, best, name, difference) for difference in DIFFERENCES]
        if name == best or all(low <= 0 <= high for _, low, high in leads):
            ties.append(name)
        cells = ("" if name == best else f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]" for mean, low, high in leads)
        lines.append(f"| {name} | {ranks[name]:.1f} | {' | '.join(cells)} | {costs[name]:.2f} |")
    chosen = min(ties, key=costs.__getitem__)
    return "\n".join([*lines, "", f"Best mean rank: {best}. It ties with: {', '.join(ties)}. The choice: {chosen}."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="a directory for runs, truths and attributions")
    parser.add_argument("--concrete", help="UCI Concrete as text")
    parser.add_argument("--mnist", help="a directory with MNIST's test images and labels")
    parser.add_argument("--tasks", nargs="*", help="names of the tasks; by default those of the rule")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    available, results = tasks(options.concrete, options.mnist), {}
    for name in options.tasks or [name for name in available if name not in SHORT]:
        directory = options.output / name
        directory.mkdir(parents=True, exist_ok=True)
        results[name] = examine(available[name], directory)
        print(table(available[name], results[name]), flush=True)
    of_all = next(iter(results.values())).evaluations
    print(verdict(results, list(of_all)), "", verdict(results, list(ESTIMATORS)), sep="\n")


if __name__ == "__main__":
    main()
