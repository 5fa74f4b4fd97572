"""Savings by stacking when recording an ensemble: examples/concrete by the Trainer, one by one, and stacked.

    python -m benchmarks.stacked_recording --data concrete.txt --seeds 20 --repeats 3 --output stacked_recording.json

Each repeat records all seeds both ways, in alternating order, so a busy machine slows both equally. Ratios are taken
within a repeat: the Trainer's time over that of stacking; then the median over repeats. Times are wall-clock time and
the process's CPU time (all threads, including those that write files), which is more reliable on a busy machine. The
stacked times are those of ``record(stacked=True)`` from the call to the last file, including the seed that the Trainer
records and the one that it starts.
"""

import argparse
import json
import logging
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
import torch

from examples.concrete.concrete import ConcreteData, ConcreteRegressor
from lightning_dtda import Ensemble, TrajectoryRecorder, record


def make_trainer(steps: int) -> pl.Trainer:
    """Return the Trainer of examples/concrete/config.yaml."""
    return pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        check_val_every_n_epoch=100,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="the table as text")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="where to write the figures as JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning_dtda").setLevel(logging.WARNING)

    def make() -> tuple[pl.Trainer, pl.LightningModule, pl.LightningDataModule]:
        return make_trainer(options.steps), ConcreteRegressor(), ConcreteData(options.data)

    def by_trainer(root: Path) -> dict[int, str]:
        return record(make, TrajectoryRecorder(root), options.seeds, progress=False)

    def stacked(root: Path) -> dict[int, str]:
        return record(make, TrajectoryRecorder(root), options.seeds, stacked=True, progress=False)

    def timed(recording: Callable[[Path], dict[int, str]]) -> dict[str, float]:
        with tempfile.TemporaryDirectory() as directory:
            wall, cpu = time.perf_counter(), time.process_time()
            failures = recording(Path(directory))
            times = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
            assert not failures, failures
            assert len(Ensemble.open(directory)) == options.seeds
        return times

    variants = {"trainer": by_trainer, "stacked": stacked}
    repeats = []
    for repeat in range(options.repeats):
        order = list(variants) if repeat % 2 else list(reversed(variants))
        repeats.append({name: timed(variants[name]) for name in order} | {"load": {"load": os.getloadavg()[0]}})
        print(repeats[-1], flush=True)
    ratios = {
        clock: [times["trainer"][clock] / times["stacked"][clock] for times in repeats] for clock in ("wall", "cpu")
    }
    for clock, found in ratios.items():
        seconds = [statistics.median(times[name][clock] for times in repeats) for name in variants]
        print(
            f"{clock}: {options.seeds} seeds in {seconds[0]:.1f} s by the Trainer, {seconds[1]:.1f} s stacked; "
            f"{statistics.median(found):.1f} times as fast ({min(found):.1f} to {max(found):.1f})"
        )
    if options.output:
        content = {
            "seeds": options.seeds,
            "steps": options.steps,
            "threads": options.threads,
            "seconds": repeats,
            "ratios": ratios,
        }
        options.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
