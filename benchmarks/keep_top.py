"""Savings and cost of keep_top: disk space, memory and CPU seconds of attributing with and without it.

    python benchmarks/keep_top.py --runs 20 --queries 200 --examples 20000 --keep_top 10

Records runs of a small network on random data, and attributes them to disk: all responses; the top examples of each
query, with scratch space for all queries at once; and in blocks of a quarter of the queries. Each is a separate process
with one thread. Disk is the size of the directory at its largest and at the end; memory is the peak that the process
allocates beyond what it has at the start of attribution. The estimator's seconds are given separately, because it
chooses its method from timed steps, and on a busy machine not always the same one.
"""

import argparse
import shutil
import tempfile
import time
import warnings
from multiprocessing import get_context
from pathlib import Path
from threading import Event, Thread

import lightning.pytorch as pl
import torch
from large_attribution import Peak
from torch.utils.data import DataLoader, TensorDataset

from lightning_dtda import (
    Attribution,
    Ensemble,
    InfluenceFunctions,
    TrajectoryRecorder,
    UnrolledDifferentiation,
    attribute,
)
from lightning_dtda.attribution.kept import FIGURES
from lightning_dtda.estimators import EKFAC
from lightning_dtda.units import GIB

ESTIMATORS = {
    "UnrolledDifferentiation(horizon=None)": lambda: UnrolledDifferentiation(horizon=None, memory_budget=1.0),
    "InfluenceFunctions(EKFAC())": lambda: InfluenceFunctions(EKFAC(), memory_budget=0.5),
}
FEATURES, WIDTH, BATCH = 16, 32, 250


class Regressor(pl.LightningModule):
    """A network with one hidden layer and the squared error."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(FEATURES, WIDTH), torch.nn.Tanh(), torch.nn.Linear(WIDTH, 1), torch.nn.Flatten(0)
        )

    def training_step(self, batch, batch_idx):
        """Return the mean squared error."""
        return (self.net(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self):
        """Return the optimizer."""
        return torch.optim.SGD(self.parameters(), lr=0.1)


def data(examples: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(examples, FEATURES, generator=generator)
    noise = 0.1 * torch.randn(examples, generator=generator)
    return TensorDataset(inputs, inputs[:, 0].sin() + inputs[:, 1] * inputs[:, 2] + noise)


def record(root: Path, runs: int, examples: int) -> None:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    for seed in range(runs):
        pl.seed_everything(seed, verbose=False)
        trainer = pl.Trainer(max_epochs=1, accelerator="cpu", callbacks=[TrajectoryRecorder(root)], **quiet)
        trainer.fit(Regressor(), DataLoader(data(examples, 0), batch_size=BATCH, shuffle=True))


class Disk:
    """Measures the largest size of a directory."""

    def __init__(self, path: Path):
        self.path, self.most, self.done = path, 0, Event()

    def now(self) -> int:
        """Return the current size, ignoring files that are removed meanwhile."""
        total = 0
        for file in self.path.rglob("*"):
            try:
                total += file.stat().st_size if file.is_file() else 0
            except FileNotFoundError:
                continue
        return total

    def __enter__(self):
        self.thread = Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self):
        """Measure ten times a second until stopped."""
        while not self.done.wait(0.1):
            self.most = max(self.most, self.now())

    def __exit__(self, *exception):
        self.done.set()
        self.thread.join()


def trial(name: str, root: Path, output: Path, queries: int, examples: int, kept: dict, figures) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    ensemble, training, asked = Ensemble.open(root), data(examples, 0), data(queries, 1)
    estimator, in_estimator = ESTIMATORS[name](), []
    original = estimator.estimate

    def timed(*arguments):
        started = time.process_time()
        found = original(*arguments)
        in_estimator.append(time.process_time() - started)
        return found

    estimator.estimate = timed
    with Disk(output) as disk, Peak() as peak:
        started = time.process_time()
        attribute(
            ensemble,
            Regressor(),
            training,
            queries=asked,
            estimator=estimator,
            output=output,
            progress=False,
            **kept,
        )
        seconds = time.process_time() - started
    figures.put((disk.most / 2**20, disk.now() / 2**20, peak.own / 2**20, sum(in_estimator), seconds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, size in (("runs", 20), ("queries", 200), ("examples", 20_000), ("keep_top", 10)):
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()), help="Where the files go.")
    parser.add_argument("--only", nargs="*", default=list(ESTIMATORS), choices=ESTIMATORS)
    options = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(dir=options.directory))
    whole = 1.01 * options.queries * (options.runs + len(FIGURES)) * options.examples * 4 / GIB
    ways = {
        "all responses": {},
        "keep_top, at once": {"keep_top": options.keep_top, "scratch_budget": whole},
        "keep_top, in four blocks": {"keep_top": options.keep_top, "scratch_budget": whole / 4},
    }
    try:
        record(scratch / "runs", options.runs, options.examples)
        print("| estimator | way | disk, most MiB | disk, MiB | own MiB | CPU seconds of it | CPU seconds |")
        print("|---|---|---|---|---|---|---|")
        for name in options.only:
            for number, (way, kept) in enumerate(ways.items()):
                context, output = get_context("spawn"), scratch / f"{name}-{number}"
                figures = context.Queue()
                arguments = (name, scratch / "runs", output, options.queries, options.examples, kept, figures)
                process = context.Process(target=trial, args=arguments)
                process.start()
                most, left, own, of_it, seconds = figures.get()
                process.join()
                print(
                    f"| {name} | {way} | {most:.0f} | {left:.0f} | {own:.0f} | {of_it:.1f} | {seconds:.1f} |",
                    flush=True,
                )
            paths = [scratch / f"{name}-{number}" for number in range(len(ways))]
            everything, *others = (Attribution.load(path) for path in paths)
            for difference in ("mean", "variance"):
                expected = everything.top(options.keep_top, difference)
                for way, found in zip(list(ways)[1:], others, strict=True):
                    top = found.top(options.keep_top, difference)
                    same = (top["example"] == expected["example"]).mean()
                    furthest = (top["influence"] / expected["influence"] - 1).abs().max()
                    print(f"{way}: the top by {difference} is the same at {same:.2%}, figures to {furthest:.1e}")
            for path in paths:
                shutil.rmtree(path)
    finally:
        shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
