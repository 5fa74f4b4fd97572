"""Cost of recording and attribution on a GPU relative to training there, and checks of their correctness.

    python -m benchmarks.gpu --json gpu.json
    python -m benchmarks.gpu --device cpu --small

First come the checks, each with a figure and its limit; then four networks (a CNN, a ResNet with GroupNorm, a ViT and a
GPT, 0.1 to 0.9 million parameters, batches of 64). Times are wall-clock times after synchronization and a warm-up. "In
trainings" means relative to the time that the Trainer takes for the same steps and runs without a recorder. Variants of
a training alternate, and their ratio is taken within a repeat. Memory is the allocator's peak above its value before,
next to the memory that the estimator's plan announces.

If a part fails, its traceback is printed and the next one starts; none starts after ``--minutes``. Without a CUDA
device, nothing is measured. The second command runs a small version of everything on the CPU, as a test.
"""

import argparse
import json
import logging
import math
import os
import statistics
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Subset, TensorDataset

from benchmarks import modules
from benchmarks.modules import Task, ask, images, resnet, sweep_only, tokens
from benchmarks.problems import GPT, cnn
from lightning_dtda import Attribution, Ensemble, InfluenceFunctions, TrajectoryRecorder, attribute
from lightning_dtda.estimators import EKFAC, Identity, UnrolledDifferentiation
from lightning_dtda.estimators.estimator import Question
from lightning_dtda.execution.memory import peak_memory

NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], TensorDataset]]] = {
    "cnn": (cnn, images),
    "resnet": (partial(resnet, nn.GroupNorm, (56, 104, 160)), images),
    "vit": modules.MODULES["vit"],
    "gpt": (GPT, tokens),
}

CHANGE = 1e-4
"""Step of the weights for finite differences: truncation is of the order of its square, rounding 1e-16 over it."""


@dataclass(frozen=True)
class Setting:
    """Device and sizes of the benchmark.

    Args:
        device: Device to run on.
        batch: Batch size.
        repeats: Number of repeats of the timed trainings.
        warm_up: Number of steps before the clock starts.
        steps: Number of steps that are timed.
        swept: Number of steps of the trainings that are attributed.
        runs: Number of runs swept together.
        queries: Number of queries in a sweep with several.
        examples: Number of training examples.
        asked: Number of queries for influence functions.
    """

    device: torch.device
    batch: int
    repeats: int
    warm_up: int
    steps: int
    swept: int
    runs: int
    queries: int
    examples: int
    asked: int

    def trainer(self, steps: int, *callbacks: pl.Callback, **arguments: Any) -> pl.Trainer:
        """Return a quiet Trainer on the device."""
        return modules.trainer(steps, *callbacks, accelerator=self.device.type, **arguments)

    def clocked(self, function: Callable[[], object]) -> float:
        """Run a function and return the seconds until the device has finished."""
        self.wait()
        started = time.perf_counter()
        function()
        self.wait()
        return time.perf_counter() - started

    def wait(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


FULL = {"batch": 64, "repeats": 3, "warm_up": 20, "steps": 60, "swept": 24}
FULL |= {"runs": 4, "queries": 8, "examples": 2000, "asked": 20}
SMALL = {"batch": 8, "repeats": 1, "warm_up": 1, "steps": 1, "swept": 2, "runs": 2, "queries": 2}
SMALL |= {"examples": 16, "asked": 2}


# -- checks: each returns a figure and its limit


Found = tuple[str, float, float]
"""Name of a check, its figure and its limit."""

ROUNDED = 1e-6
"""Limit for the relative deviation of gradients recorded in single precision."""


class Weighted(pl.LightningModule):
    """A smooth CNN with dropout, trained on weighted losses."""

    def __init__(self, dropout: float = 0.2) -> None:
        super().__init__()
        self.network = nn.Sequential(
            *(nn.Conv2d(3, 8, 3, padding=1), nn.GELU(), nn.AvgPool2d(4), nn.Dropout(dropout), nn.Flatten()),
            *(nn.Linear(128, 32), nn.GELU(), nn.Dropout(dropout), nn.Linear(32, 10)),
        )

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Mean of the weighted cross entropies."""
        pictures, labels, weights = batch
        return (weights * functional.cross_entropy(self.network(pictures), labels, reduction="none")).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with momentum."""
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def train_weighted(setting: Setting, weights: Tensor, *callbacks: pl.Callback, dropout: float) -> Weighted:
    """Train in double precision from a fixed seed."""
    pl.seed_everything(0, verbose=False)
    module = Weighted(dropout).double()
    setting.trainer(15, *callbacks).fit(module, DataLoader(weighted(weights), 32, shuffle=True))
    return module


def weighted(weights: Tensor) -> TensorDataset:
    """Random images with labels and weights, in double precision."""
    pictures, labels = images(len(weights)).tensors
    return TensorDataset(pictures.double(), labels, weights)


def drift(what: str, attribution: Attribution, parameters: float, gradients: float) -> Iterator[Found]:
    """Yield the largest relative deviations of a replay from the record, with their limits."""
    of_runs = attribution.about["drift"].values()
    yield f"{what}: drift of the replayed parameters", max(each["parameters"] for each in of_runs), parameters
    yield f"{what}: drift of the gradients", max(each["gradients"] for each in of_runs), gradients


def finite_differences(setting: Setting, root: Path) -> Iterator[Found]:
    """Responses of a training with dropout against its retraining by the Trainer with other weights."""
    ones = torch.ones(96, dtype=torch.float64)
    queries = Subset(weighted(ones), range(4))
    train_weighted(setting, ones, TrajectoryRecorder(root), dropout=0.2)
    estimator = UnrolledDifferentiation(horizon=None)
    arguments = {"queries": queries, "estimator": estimator, "device": setting.device, "progress": False}
    found = attribute(Ensemble.open(root), Weighted(), weighted(ones), **arguments)
    yield from drift("dropout, float64", found, 1e-12, ROUNDED)
    pictures, labels, _ = weighted(ones)[:4]

    def predicted(weights: Tensor) -> Tensor:
        network = train_weighted(setting, weights, dropout=0.2).network.eval().cpu()
        with torch.no_grad():
            return functional.cross_entropy(network(pictures), labels, reduction="none")

    worst = 0.0
    for seed in range(2):
        direction = torch.randn(96, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        direction /= direction.norm()
        expected = -(predicted(ones + CHANGE * direction) - predicted(ones - CHANGE * direction)) / (2 * CHANGE)
        responses = found.responses[0].double() @ direction
        worst = max(worst, float((responses - expected).abs().max() / expected.abs().max()))
    yield "dropout, float64: responses against finite differences of weighted retraining", worst, 1e-5


def both_devices(setting: Setting, root: Path) -> Iterator[Found]:
    """Responses to the same float64 run, computed on the CPU and on the device."""
    ones = torch.ones(96, dtype=torch.float64)
    train_weighted(setting, ones, TrajectoryRecorder(root), dropout=0.0)
    for name, estimator in {
        "unrolled": UnrolledDifferentiation(horizon=None),
        "EK-FAC": InfluenceFunctions(EKFAC()),
    }.items():
        on_cpu, on_device = (
            attribute(
                *(Ensemble.open(root), Weighted(0.0), weighted(ones)),
                **{"queries": Subset(weighted(ones), range(4)), "estimator": estimator, "device": where},
                progress=False,
            ).responses
            for where in ("cpu", setting.device)
        )
        difference = float((on_cpu - on_device).abs().max() / on_cpu.abs().max())
        yield f"float64, {name}: CPU against {setting.device.type}", difference, 1e-9


def mixed_precision(setting: Setting, root: Path) -> Iterator[Found]:
    """A training in mixed precision, recorded and attributed."""
    module, loader = record(setting, root, "resnet", precision="bf16-mixed")
    found = responses(setting, root, module, loader)
    yield from drift("bf16-mixed", found, 1e-3, 2**-7)  # twice the rounding of bfloat16
    yield "bf16-mixed: responses that are not finite", float((~found.responses.isfinite()).sum()), 0.0


def deterministic(setting: Setting, root: Path) -> Iterator[Found]:
    """Deterministic kernels, in the training and in attribution."""
    torch.use_deterministic_algorithms(True)
    try:
        module, loader = record(setting, root, "resnet")
        first, second = (responses(setting, root, module, loader) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    yield from drift("deterministic kernels", first, 1e-6, 1e-5)
    changed = float((first.responses != second.responses).sum())
    yield "deterministic kernels: responses that a second call changes", changed, 0.0


CHECKS = {
    "finite differences": finite_differences,
    "both devices": both_devices,
    "mixed precision": mixed_precision,
    "deterministic": deterministic,
}


def record(
    setting: Setting, root: Path, net: str, runs: int = 1, **arguments: Any
) -> tuple[pl.LightningModule, DataLoader]:
    """Train and record some runs of a network; return the last module and the data."""
    make, data = NETS[net]
    loader = DataLoader(data(setting.examples), setting.batch, shuffle=True)
    for seed in range(runs):
        pl.seed_everything(seed, verbose=False)
        module = Task(make())
        recorder = TrajectoryRecorder(root, gradients="float32")
        setting.trainer(setting.swept, recorder, **arguments).fit(module, loader)
    return module, loader


def responses(setting: Setting, root: Path, module: pl.LightningModule, loader: DataLoader) -> Attribution:
    """Attribute by exact unrolling."""
    queries = Subset(loader.dataset, range(2))
    arguments = {"estimator": UnrolledDifferentiation(horizon=None), "device": setting.device, "progress": False}
    return attribute(Ensemble.open(root), module, loader, queries=queries, **arguments)


# -- figures: each function returns figures by name, and gets those of the network so far


STEP = "training, ms a step"


class Clock(pl.Callback):
    """Starts when the warm-up is over."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    def on_train_batch_start(self, trainer: pl.Trainer, *args: object) -> None:
        """Start."""
        if trainer.global_step == self.setting.warm_up:
            self.setting.wait()
            self.started = time.perf_counter()


def training(setting: Setting, net: str, before: dict[str, float]) -> dict[str, float]:
    """Time a step, without and with recording; waiting for the files at the end is included."""
    make, data = NETS[net]
    loader = DataLoader(data(setting.examples), setting.batch, shuffle=True)

    def step(gradients: str | None) -> float:
        pl.seed_everything(0, verbose=False)
        clock = Clock(setting)
        with tempfile.TemporaryDirectory() as root:
            recorders = [] if gradients is None else [TrajectoryRecorder(root, gradients=gradients)]
            steps = setting.warm_up + setting.steps
            setting.trainer(steps, clock, *recorders).fit(Task(make()), loader)
            setting.wait()
            return (time.perf_counter() - clock.started) / setting.steps

    variants = (None, "none", "float32")
    step(None)
    taken: list[dict[str | None, float]] = []
    for repeat in range(setting.repeats):
        order = variants[repeat % 3 :] + variants[: repeat % 3]
        taken.append({gradients: step(gradients) for gradients in order})
    found = {STEP: 1000 * statistics.median(each[None] for each in taken)}
    for gradients in variants[1:]:
        ratio = statistics.median(each[gradients] / each[None] for each in taken)
        found[f"recording, gradients {gradients}, over training"] = ratio
    return found


def sweeps(setting: Setting, net: str, before: dict[str, float]) -> dict[str, float]:
    """Time reverse sweeps of recorded runs, and measure the memory of the estimator's plan."""
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        module, loader = record(setting, root, net, setting.runs)
        ensemble, estimator = (
            Ensemble.open(root),
            UnrolledDifferentiation(mode="reverse", horizon=None, memory_budget=8),
        )

        def seconds(runs: Ensemble, queries: int, stacked: bool) -> float:
            question = ask(module, loader, queries, setting.device)
            plan = estimator.plan([*runs], question)
            plan = replace(plan, stacked=stacked, held=math.inf)
            call = partial(sweep_only, estimator, runs, question, plan)
            call()
            return min(setting.clocked(call) for _ in range(2))

        of_training = setting.swept * before.get(STEP, math.nan) / 1000
        one, three = (seconds(ensemble[:1], queries, False) for queries in (1, 3))
        found = {
            "sweep, eager, one query, in trainings": one / of_training,
            "sweep, eager, a further query, in trainings": (three - one) / 2 / of_training,
        }
        label = f"{setting.runs} runs x {setting.queries} queries"
        question = ask(module, loader, setting.queries, setting.device)
        if question.replay([*ensemble[:1]]).can_stack:
            together = seconds(ensemble, setting.queries, True) / (setting.runs * of_training)
            found[f"sweep, stacked, {label}, in trainings"] = together
            found["sweep, stacked, a run and query, in trainings"] = together / setting.queries
        plan = estimator.plan([*ensemble], question)
        found[f"unrolled, {label}, stacked by choice"] = float(plan.stacked)
        return found | memory(setting, f"unrolled, {label}", estimator, question, plan)


def memory(setting: Setting, label: str, estimator: Any, question: Question, plan: Any) -> dict[str, float]:
    """Measure the peak of a planned answer for the first batch of runs."""
    call = partial(estimator.estimate, plan.batches[0], question, plan, lambda steps: None)
    call()  # chooses the chunk sizes, which measures memory as well
    peak = peak_memory(call, setting.device)
    return {f"{label}, announced MiB": plan.memory / 2**20, f"{label}, peak MiB": peak / 2**20}


def influence(setting: Setting, net: str, before: dict[str, float]) -> dict[str, float]:
    """Time influence functions, the whole call, and measure their memory."""
    found = {}
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        module, loader = record(setting, root, net)
        ensemble, queries = Ensemble.open(root), Subset(loader.dataset, range(setting.asked))
        for name, curvature in {"identity": Identity(), "EK-FAC": EKFAC(samples=1)}.items():
            estimator = InfluenceFunctions(curvature)
            arguments = {"queries": queries, "estimator": estimator, "device": setting.device, "progress": False}
            call = partial(attribute, ensemble, module, loader, **arguments)
            call()
            label = f"{name}, {setting.asked} queries, {setting.examples} examples"
            found[f"{label}, s"] = min(setting.clocked(call) for _ in range(2))
            question = ask(module, loader, setting.asked, setting.device)
            found |= memory(setting, label, estimator, question, estimator.plan([*ensemble], question))
    return found


# -- all of it


class Account:
    """Runs one part after the other, and keeps the results.

    Args:
        deadline: Value of ``time.perf_counter`` after which no part starts.
        path: Path of the JSON file, which is rewritten after every part.
        facts: Circumstances that the figures depend on.
    """

    def __init__(self, deadline: float, path: Path | None, facts: dict[str, Any]) -> None:
        self.deadline, self.path = deadline, path
        self.found: dict[str, Any] = {"facts": facts, "checks": [], "figures": {}, "failed": [], "seconds": {}}

    @contextmanager
    def part(self, name: str) -> Iterator[bool]:
        """Yield whether there is time for a part; if the part fails, print the traceback and continue."""
        started = time.perf_counter()
        if started > self.deadline:
            print(f"{name}: left out, no time", flush=True)
            self.found["failed"].append(f"{name}: no time")
            yield False
            return
        try:
            yield True
        except Exception as error:  # the figures of the other parts are still useful
            print(f"{name} FAILED\n{traceback.format_exc()}", flush=True)
            self.found["failed"].append(f"{name}: {type(error).__name__}: {error}")
        self.found["seconds"][name] = round(time.perf_counter() - started, 1)
        if self.path:
            self.path.write_text(json.dumps(self.found, indent=1), encoding="utf-8")

    def check(self, what: str, figure: float, limit: float) -> None:
        """Print a check and keep it."""
        passed = figure <= limit
        print(f"{'PASS' if passed else 'FAIL'}  {what}: {figure:.2g} (at most {limit:g})", flush=True)
        self.found["checks"].append({"what": what, "figure": figure, "limit": limit, "passed": passed})

    def figures(self, net: str, found: dict[str, float]) -> None:
        """Keep figures of a network."""
        print(f"{net}: " + ", ".join(f"{what}: {value:.3g}" for what, value in found.items()), flush=True)
        self.found["figures"].setdefault(net, {}).update(found)

    def table(self) -> str:
        """Return the figures of all networks in Markdown."""
        figures = self.found["figures"]
        names = dict.fromkeys(name for of_net in figures.values() for name in of_net)
        lines = [["", *figures], ["---"] * (1 + len(figures))]
        lines += [[name, *(f"{of[name]:.3g}" if name in of else "" for of in figures.values())] for name in names]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def facts(setting: Setting) -> dict[str, Any]:
    """Return the circumstances that the figures depend on."""
    is_cuda = setting.device.type == "cuda"
    sizes = {net: sum(parameter.numel() for parameter in make().parameters()) for net, (make, _) in NETS.items()}
    return {
        "device": torch.cuda.get_device_name(setting.device) if is_cuda else "CPU",
        "torch": torch.__version__,
        "lightning": pl.__version__,
        "TF32 in convolutions": torch.backends.cudnn.allow_tf32,
        "matrix products": torch.get_float32_matmul_precision(),
        "parameters": sizes,
    }


def main() -> None:
    """Check, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--small", action="store_true", help="use a few steps and examples, as a test")
    parser.add_argument("--nets", nargs="*", default=list(NETS), choices=list(NETS))
    parser.add_argument("--checks", nargs="*", default=list(CHECKS), choices=list(CHECKS))
    parser.add_argument("--minutes", type=float, default=5.5, help="minutes after which no part starts")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("No CUDA device: nothing is measured. --device cpu --small tries all parts here.")
        return
    deadline = time.perf_counter() + 60 * options.minutes
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic products; read at the first of them
    warnings.filterwarnings("ignore")
    for name in ("lightning_dtda", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    setting = Setting(torch.device(options.device), **(SMALL if options.small else FULL))
    account = Account(deadline, options.json, facts(setting))
    print(json.dumps(account.found["facts"]), flush=True)
    for name in options.checks:
        with tempfile.TemporaryDirectory() as root, account.part(name) as go:
            for found in CHECKS[name](setting, Path(root)) if go else ():
                account.check(*found)
    for trial in (training, sweeps, influence):
        for net in options.nets:
            with account.part(f"{net}, {trial.__name__}") as go:
                if go:
                    account.figures(net, trial(setting, net, account.found["figures"].get(net, {})))
    print(account.table())
    outcomes = [check["passed"] for check in account.found["checks"]]
    print(f"{sum(outcomes)} of {len(outcomes)} checks passed; failed parts: {account.found['failed'] or 'none'}")


if __name__ == "__main__":
    main()
