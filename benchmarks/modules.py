"""Cost of a sweep relative to training, for networks with a hundred thousand to two million parameters.

    OMP_NUM_THREADS=1 python -m benchmarks.modules --modules resnet_group_norm vit

Trains each network with a plain Trainer, records the same training, and sweeps it backwards for one query and for
three, all in one process on one thread. Prints CPU seconds relative to the plain training, and the peak memory of a
sweep for one query beyond that of the training, in units of the graph that a training step keeps for its backward pass,
for two lengths of the training. The training's memory is that of a step, the parameters and their momentum. The share
of planning and diagnosis is that of one query's attribution of one run of ``LONG`` steps: the plan is made for that
length, the sweep is extrapolated.
"""

import argparse
import gc
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, Subset, TensorDataset

from benchmarks.problems import cnn
from lightning_dtda import Ensemble, TrajectoryRecorder
from lightning_dtda.estimators import UnrolledDifferentiation
from lightning_dtda.estimators.estimator import Plan, Question
from lightning_dtda.estimators.removals import resolve_removals
from lightning_dtda.execution.memory import kept_pages, peak_memory
from lightning_dtda.replay import query_examples, resolve_measurement, training_examples
from lightning_dtda.trajectory.prolonged import ProlongedRun

BATCH, CPU = 64, torch.device("cpu")

SHORT = 8
"""Number of steps in the shorter training whose memory is measured."""

LONG = 400
"""Number of steps in the training for which the share of planning and diagnosis is reported."""


class Task(pl.LightningModule):
    """Trains a network on classes, or on the next token, by SGD with momentum."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Cross entropy."""
        scores = self.network(batch[0])
        return functional.cross_entropy(scores.flatten(0, -2), batch[1].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with momentum."""
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


class Block(nn.Module):
    """A residual block of two convolutions with norms."""

    def __init__(self, channels: int, norm: type[nn.Module]) -> None:
        super().__init__()
        make = (lambda: nn.GroupNorm(8, channels)) if norm is nn.GroupNorm else (lambda: nn.BatchNorm2d(channels))
        self.layers = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            make(),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            make(),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return the images plus the output of the layers."""
        return torch.relu(images + self.layers(images))


def resnet(norm: type[nn.Module], widths: tuple[int, int, int] = (32, 64, 96)) -> nn.Module:
    """A ResNet for small images."""
    first, second, third = widths
    return nn.Sequential(
        nn.Conv2d(3, first, 3, padding=1),
        Block(first, norm),
        nn.Conv2d(first, second, 3, stride=2, padding=1),
        Block(second, norm),
        nn.Conv2d(second, third, 3, stride=2, padding=1),
        Block(third, norm),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(third, 10),
    )


class Transformer(nn.Module):
    """A transformer over patches of an image, or over tokens with a causal mask."""

    def __init__(self, inputs: nn.Module, length: int, width: int, layers: int, outputs: int, causal: bool) -> None:
        super().__init__()
        self.inputs = inputs
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.outputs = nn.Linear(width, outputs)
        self.causal = causal

    def forward(self, inputs: Tensor) -> Tensor:
        """Return scores for each image ``(B, C)``, or for each token ``(B, T, C)``."""
        hidden = self.inputs(inputs) + self.positions
        mask = nn.Transformer.generate_square_subsequent_mask(hidden.shape[1]) if self.causal else None
        hidden = self.encoder(hidden, mask=mask, is_causal=self.causal)
        return self.outputs(hidden if self.causal else hidden.mean(1))


class Patches(nn.Module):
    """Linear embeddings of the patches of an image."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, size, stride=size)

    def forward(self, images: Tensor) -> Tensor:
        """Return ``(B, T, width)``."""
        return self.embed(images).flatten(2).transpose(1, 2)


class Recurrent(nn.Module):
    """An LSTM over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 128)
        self.lstm = nn.LSTM(128, 256, num_layers=2, batch_first=True)
        self.outputs = nn.Linear(256, 64)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return scores of the next token ``(B, T, C)``."""
        return self.outputs(self.lstm(self.embed(tokens))[0])


def images(examples: int) -> TensorDataset:
    """Random images with labels."""
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(
        torch.randn(examples, 3, 16, 16, generator=generator), torch.randint(10, (examples,), generator=generator)
    )


def tokens(examples: int) -> TensorDataset:
    """Random tokens with the next ones."""
    drawn = torch.randint(64, (examples, 33), generator=torch.Generator().manual_seed(0))
    return TensorDataset(drawn[:, :-1], drawn[:, 1:])


MODULES = {
    "cnn": (cnn, images),
    "resnet_group_norm": (lambda: resnet(nn.GroupNorm), images),
    "resnet_batch_norm": (lambda: resnet(nn.BatchNorm2d), images),
    "vit": (lambda: Transformer(Patches(4, 128), 16, 128, 4, 10, causal=False), images),
    "gpt": (lambda: Transformer(nn.Embedding(64, 128), 32, 128, 4, 64, causal=True), tokens),
    "lstm": (Recurrent, tokens),
}


def trainer(steps: int, *callbacks: pl.Callback, accelerator: str = "cpu", **arguments: Any) -> pl.Trainer:
    """Return a quiet Trainer."""
    return pl.Trainer(
        max_steps=steps,
        accelerator=accelerator,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **arguments,
    )


def ask(module: pl.LightningModule, loader: DataLoader, queries: int, device: torch.device = CPU) -> Question:
    """Return queries for the loss on the first training examples."""
    training = training_examples(loader)
    asked = query_examples(Subset(loader.dataset, range(queries)), training)
    measurement = resolve_measurement("loss")[1]
    return Question(module, training, asked, measurement, device, resolve_removals("leave-one-out", training))


def cpu(function) -> float:
    """Run a function and return its CPU seconds."""
    gc.collect()
    start = time.process_time()
    function()
    return time.process_time() - start


def trial(name: str, steps: int, repeats: int) -> dict[str, float]:
    """Train, record and sweep one network."""
    make, data = MODULES[name]
    examples = data(min(steps, 8) * BATCH)
    loader = DataLoader(examples, BATCH, shuffle=True)
    root = tempfile.mkdtemp()

    def fit(*callbacks: pl.Callback, count: int = steps) -> pl.LightningModule:
        pl.seed_everything(0, verbose=False)
        module = Task(make())
        trainer(count, *callbacks).fit(module, loader)
        return module

    module = fit(TrajectoryRecorder(root))
    fit(count=2)  # warms up
    ensemble = Ensemble.open(root)
    estimator = UnrolledDifferentiation(mode="reverse", horizon=None, runs_per_batch=1, memory_budget=8)
    times: dict[str, list[float]] = {"training": [], "one": [], "three": []}
    # planning takes a step, which makes the module's copy and the cut
    asked = {"one": ask(module, loader, 1), "three": ask(module, loader, 3)}
    plans = {label: estimator.plan([*ensemble], question) for label, question in asked.items()}
    for _ in range(repeats):
        times["training"].append(cpu(fit))
        for label, question in asked.items():
            times[label].append(cpu(partial(sweep_only, estimator, ensemble, question, plans[label])))
    fastest = {label: min(found) for label, found in times.items()}
    size = sum(parameter.numel() for parameter in module.parameters())
    found = {
        "parameters": size,
        "training, ms a step": round(1000 * fastest["training"] / steps, 1),
        "one query / training": round(fastest["one"] / fastest["training"], 2),
        "a further query / training": round((fastest["three"] - fastest["one"]) / 2 / fastest["training"], 2),
    }
    run, question = ensemble[0], ask(module, loader, 1)  # without the copy and the cut
    longer = ProlongedRun(run, LONG, round(LONG**0.5), len(examples))
    planned: list[Plan] = []
    planning = cpu(lambda: planned.append(estimator.plan([longer], question)))
    diagnosis = cpu(lambda: estimator._diagnoses([run], question, planned[0]))
    rest = planning + diagnosis
    found[f"share of planning and diagnosis, {LONG} steps"] = round(rest / (rest + LONG / steps * fastest["one"]), 3)
    found["planning / diagnosis, s"] = f"{planning:.1f} / {diagnosis:.1f}"
    found["stacked"] = planned[0].stacked
    batch = next(iter(loader))
    graph = kept_memory(lambda: module.training_step(batch, 0))
    module.zero_grad()
    of_training = peak_memory(lambda: module.training_step(batch, 0).backward(), CPU) + 2 * 4 * size
    for length in (SHORT, 4 * SHORT):
        root = tempfile.mkdtemp()
        fit(TrajectoryRecorder(root), count=length)
        recorded, question = Ensemble.open(root), ask(module, loader, 1)
        plan = estimator.plan([*recorded], question)
        # the module's parameters, which were there before, are the training's as well
        of_sweep = peak_memory(partial(sweep_only, estimator, recorded, question, plan), CPU) + 4 * size
        found[f"memory beyond the training's / graph, {length} steps"] = round((of_sweep - of_training) / graph, 2)
    return found | {"graph, MiB": round(graph / 2**20, 1)}


def kept_memory(function: Callable[[], object]) -> int:
    """Return the number of bytes held by a function's result."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        kept = function()
    del kept
    return sum(event.self_cpu_memory_usage for event in record.events() or [])


def sweep_only(estimator: UnrolledDifferentiation, ensemble: Ensemble, question: Question, plan) -> None:
    """Sweep without the diagnosis, whose share of the cost falls with the length of the training."""
    from lightning_dtda.estimators.sweep import Adjoints, sweep

    replay = question.replay([*ensemble]).stack(plan.stacked)
    replay.held = plan.held
    with kept_pages(replay.device):
        adjoints = Adjoints.at_end(replay, *question.measure_with_gradients(replay, range(len(question.queries)))[1:])
        sweep(replay, adjoints, len(question.examples), None, lambda steps: None)


def main() -> None:
    """Print the figures of each network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modules", nargs="*", default=list(MODULES), choices=list(MODULES))
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    time.perf_counter = time.process_time  # what planning times to choose how to go about it, on a busy machine too
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for name in options.modules:
        print(json.dumps({"module": name, **trial(name, options.steps, options.repeats)}), flush=True)


if __name__ == "__main__":
    main()
