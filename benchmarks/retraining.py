"""Savings by stacking: the trainings of examples/concrete without a tenth of the rows, by the Trainer and stacked.

    python -m benchmarks.retraining --data concrete.txt --seeds 128 --repeats 3 --output retraining.json

Each repeat trains with the Trainer (a few seeds, one after the other), stacked, stacked and compiled, and with the
hand-written batched matrix products of ``concrete_truth.py`` (about as fast as a CPU can do it), in rotating order, so
a busy machine slows all of them equally. Ratios are taken within a repeat: the Trainer's time for a training over that
of a stacked one; then the median over repeats. Times are wall-clock time and the process's CPU time, which is more
reliable on a busy machine. The stacked times are those of ``retrain`` from the call to the measurements, including the
training by the Trainer that every stack is compared with, which is one of the requested ones. The single training of
the baseline, which ``retrain`` requires, is done before. The first compiled call does not count: it fills the cache for
the others.
"""

import argparse
import json
import logging
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.utils.data import Subset

from benchmarks.concrete_truth import QUERIES, RATE, WIDTH, concrete, removals
from benchmarks.concrete_truth import retrain as by_hand
from examples.concrete.concrete import ConcreteRegressor
from examples.concrete.evaluation import make_trainer
from lightning_dtda import retrain


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
    with tempfile.TemporaryDirectory() as directory:
        first, repeats = trial(options, Path(directory))
    ratios = {
        name: {
            clock: statistics.median(times["trainer"][clock] / times[name][clock] for times in repeats)
            for clock in ("wall", "cpu")
        }
        for name in ("stacked", "compiled", "by hand")
    }
    for name, ratio in ratios.items():
        print(f"{name}: {ratio['wall']:.1f} times as fast as the Trainer, {ratio['cpu']:.1f} by CPU time")
    if options.output:
        content = {
            "seeds": options.seeds,
            "threads": options.threads,
            "seconds for a training": repeats,
            "ratios": ratios,
            "seconds of the first compiled call": first,
        }
        options.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def trial(options: argparse.Namespace, directory: Path) -> tuple[dict[str, float], list[dict[str, dict[str, float]]]]:
    """Return the seconds for a training in the first compiled call, and of all variants in each repeat."""
    data = concrete(options.data)
    removed = removals(len(data.train))[0]
    kept = torch.ones(len(data.train), dtype=torch.bool)
    kept[removed] = False

    started = directory / "started"

    def timed(function: Callable[[Path], object], trainings: int) -> dict[str, float]:
        output = directory / "truth"
        shutil.copytree(started, output)
        wall, cpu = time.perf_counter(), time.process_time()
        function(output)
        seconds = {"wall": (time.perf_counter() - wall) / trainings, "cpu": (time.process_time() - cpu) / trainings}
        shutil.rmtree(output)
        return seconds

    def train(seeds: Sequence[int], output: Path, stacked: bool = False, compile: bool = False) -> None:
        retrain(
            lambda: ConcreteRegressor(WIDTH, RATE),
            data,
            subsets=[removed.tolist()],
            seeds=seeds,
            baseline_seeds=[0],
            queries=Subset(data.validation, range(QUERIES)),
            measurement="prediction",
            stacked=stacked,
            compile=compile,
            output=output,
            trainer=make_trainer,
            progress=False,
        )

    few, many = range(1, 1 + options.trained), range(1, 1 + options.seeds)
    train([0], started)
    left = kept.nonzero()[:, 0]
    variants: dict[str, tuple[Callable[[Path], object], int]] = {
        "trainer": (lambda output: train(few, output), options.trained),
        "stacked": (lambda output: train(many, output, stacked=True), options.seeds),
        "compiled": (lambda output: train(many, output, stacked=True, compile=True), options.seeds),
        "by hand": (lambda output: by_hand(data, left, options.seeds, 1), options.seeds),
    }
    first = timed(variants["compiled"][0], 1)
    print(f"the first compiled call: {first['wall']:.0f} s, {first['cpu']:.0f} s of CPU time", flush=True)
    names = list(variants)
    repeats = []
    for repeat in range(options.repeats):
        order = names[repeat % len(names) :] + names[: repeat % len(names)]
        times = {name: timed(*variants[name]) for name in order}
        repeats.append(times)
        print({name: f"{1e3 * times[name]['cpu']:.1f} ms of CPU time" for name in names}, flush=True)
    return first, repeats


if __name__ == "__main__":
    main()
