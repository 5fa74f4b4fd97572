"""Savings by compiling: cost of the derivatives of one step relative to the step itself, plain and compiled.

    python -m benchmarks.compiled --nets vit gpt
    python -m benchmarks.compiled --nets vit --device cuda

For the networks of ``modules.py`` with batches of 64: one run with one query and with several, one after another, and a
few runs and queries stacked. Figures are in units of a bare training step (forward and backward, no optimizer), for the
fastest of several calls, in CPU seconds on one thread, or on a GPU in wall-clock seconds after synchronization.
Compiling is timed by the wall clock, from an empty cache.
"""

import argparse
import json
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from benchmarks.modules import MODULES, Task
from lightning_dtda import Ensemble, TrajectoryRecorder
from lightning_dtda.execution.memory import kept_pages, peak_memory
from lightning_dtda.replay import Replay, training_examples

BATCH, STEPS, CALLS = 64, 4, 5


def fastest(function: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of the fastest of several calls, after a first one."""
    function()
    times = []
    for _ in range(CALLS):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            started = time.perf_counter()
            function()
            torch.cuda.synchronize(device)
            times.append(time.perf_counter() - started)
        else:
            started = time.process_time()
            function()
            times.append(time.process_time() - started)
    return min(times)


def step_of(replay: Replay, queries: int) -> Callable[[], object]:
    """Return a function that computes the derivatives of the first step for some queries."""
    point, buffers = replay.point(0), replay.buffers(0)
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(len(replay.runs), queries, replay.layout.size, generator=generator).to(point.theta)
    statistics = replay.no_statistics(directions)
    return lambda: replay.directional(0, point, directions, buffers, statistics)


def trial(net: str, device: torch.device, runs: int, queries: int) -> dict[str, Any]:
    """Train a network for some steps, and time the derivatives of the first one."""
    make, data = MODULES[net]
    examples = data(STEPS * BATCH)
    with tempfile.TemporaryDirectory() as root, kept_pages(device):
        for seed in range(runs):
            pl.seed_everything(seed, verbose=False)
            trainer = pl.Trainer(
                max_steps=STEPS,
                accelerator="gpu" if device.type == "cuda" else "cpu",
                devices=1,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                callbacks=[TrajectoryRecorder(root)],
            )
            trainer.fit(Task(make()), DataLoader(examples, BATCH, shuffle=True))
        ensemble = list(Ensemble.open(root))
        module = Task(make()).to(device)
        alone = Replay(ensemble[:1], module, training_examples(examples), device=device)
        batch = [part.to(device) for part in alone.batch(0).passes[0][0].batch()]

        def train() -> None:
            module.zero_grad()
            module.training_step(batch, 0).backward()

        unit = fastest(train, device)
        found: dict[str, Any] = {"training step, ms": 1000 * unit}
        ways = {
            "one query": (alone, 1, 1),
            f"{queries} queries": (alone, queries, 1),
            f"{runs} runs x {queries} queries stacked, of one run": (alone.of(ensemble).stack(), queries, runs),
        }
        for name, (replay, count, size) in ways.items():
            found[name] = fastest(step_of(replay, count), device) / unit / size
            found[f"{name}, MiB"] = peak_memory(step_of(replay, count), device) / 2**20
            compiled = replay.compile()
            started = time.perf_counter()
            step_of(compiled, count)()
            seconds = time.perf_counter() - started
            if compiled.ways.has_compiled:
                found[f"{name}, compiled"] = fastest(step_of(compiled, count), device) / unit / size
                found[f"{name}, compiled, MiB"] = peak_memory(step_of(compiled, count), device) / 2**20
                found[f"{name}, seconds to compile"] = seconds
        return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", default=["vit", "gpt"], choices=list(MODULES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--runs", type=int, default=4)
    parser.add_argument("--queries", type=int, default=8)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    for name in ("lightning_dtda", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        for net in options.nets:
            found = trial(net, torch.device(options.device), options.runs, options.queries)
            print(json.dumps({"net": net, "device": options.device} | found, indent=1), flush=True)


if __name__ == "__main__":
    main()
