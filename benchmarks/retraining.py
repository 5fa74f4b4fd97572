"""What stacking saves: the trainings of examples/concrete without a tenth of the rows, by the Trainer and stacked.

    python -m benchmarks.retraining --data concrete.txt --seeds 128 --repeats 3 --output retraining.json

Each repeat trains by the Trainer (a few seeds, one after the other), stacked, stacked and compiled, and by the batched
matrix products that ``concrete_truth.py`` has written out (as fast as this is done on the CPU), in an order that
rotates, so that a busy machine slows all of them alike. Ratios are taken within a repeat: the Trainer's seconds for a
training over those of a stacked one; then the median over repeats. The stacked times are those of ``retrain`` from the
call to the measurements, with the trainings by the Trainer that every stack is compared with. A first compiled call
does not count: what it compiles, the others find in a cache.
"""

import argparse
import json
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch.utils.data import Subset

from benchmarks.concrete_truth import QUERIES, RATE, STEPS, WIDTH, concrete, removals
from benchmarks.concrete_truth import retrain as by_hand
from examples.concrete.concrete import ConcreteRegressor
from lightning_dtda import retrain
from lightning_dtda.retraining import Engine, StackedEngine, TrainerEngine


def make_trainer() -> pl.Trainer:
    return pl.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="the table as text")
    parser.add_argument("--seeds", type=int, default=128, help="stacked trainings")
    parser.add_argument("--trained", type=int, default=6, help="trainings by the Trainer, in each repeat")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="where to write the figures as JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning_dtda").setLevel(logging.WARNING)
    data = concrete(options.data)
    removed = removals(len(data.train))[0]
    kept = torch.ones(len(data.train), dtype=torch.bool)
    kept[removed] = False

    def seconds_of(engine: Engine, seeds: int) -> float:
        """Return the seconds for a training; all but one of them, on everything, are without the tenth."""
        begun = time.perf_counter()
        retrain(
            lambda: ConcreteRegressor(WIDTH, RATE),
            data,
            subsets=[removed.tolist()],
            seeds=seeds - 1,
            baseline_seeds=1,
            queries=Subset(data.validation, range(QUERIES)),
            measurement="prediction",
            engine=engine,
            trainer=make_trainer,
            progress=False,
        )
        return (time.perf_counter() - begun) / seeds

    def seconds_by_hand() -> float:
        begun = time.perf_counter()
        by_hand(data, kept.nonzero()[:, 0], options.seeds, 1)
        return (time.perf_counter() - begun) / options.seeds

    variants: dict[str, Callable[[], float]] = {
        "trainer": lambda: seconds_of(TrainerEngine(), options.trained),
        "stacked": lambda: seconds_of(StackedEngine(compile=False), options.seeds),
        "compiled": lambda: seconds_of(StackedEngine(compile=True), options.seeds),
        "by hand": seconds_by_hand,
    }
    begun = time.perf_counter()
    first = seconds_of(StackedEngine(compile=True), options.seeds) * options.seeds
    print(f"the first compiled call: {first:.0f} s", flush=True)
    names = list(variants)
    repeats = []
    for repeat in range(options.repeats):
        order = names[repeat % len(names) :] + names[: repeat % len(names)]
        repeats.append({name: variants[name]() for name in order})
        print({name: f"{1e3 * repeats[-1][name]:.1f} ms" for name in names}, flush=True)
    ratios = {
        name: statistics.median(repeat["trainer"] / repeat[name] for repeat in repeats)
        for name in names
        if name != "trainer"
    }
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.1f} times as fast as the Trainer")
    if options.output:
        content = {
            "seeds": options.seeds,
            "threads": options.threads,
            "seconds for a training": repeats,
            "ratios": ratios,
            "seconds of the first compiled call": first,
            "seconds in all": time.perf_counter() - begun,
        }
        options.output.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
