"""Costs announced by ``plan`` against the real costs of recording and attributing.

    OMP_NUM_THREADS=1 python -m benchmarks.announced --nets demo cnn gpt

Uses the network of ``lightning-dtda demo``, and the CNN and the GPT of ``problems.py``. ``plan`` trains at
least ten steps; then the runs are recorded, and each estimator runs in a separate process. Times are CPU seconds on one
thread in both cases. Memory is the peak of the process's private memory (``RssAnon``) above its value before the call;
it is compared with what ``plan`` announces, and with what ``attribute`` itself logs before it starts.
"""

import argparse
import logging
import re
import tempfile
import time
import warnings
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, Subset

from benchmarks import problems
from benchmarks.large_attribution import Peak
from benchmarks.ours import NetModule
from lightning_dtda import Ensemble, InfluenceFunctions, TrajectoryRecorder, UnrolledDifferentiation, attribute, plan
from lightning_dtda.demo.diabetes import DiabetesData, DiabetesRegressor
from lightning_dtda.estimators import EKFAC, Estimator, GaussNewton, Identity, TracIn
from lightning_dtda.estimators.estimator import labels

EPOCHS = {"demo": 50, **problems.EPOCHS}


def estimators(net: str, part: str) -> list[Estimator]:
    """Return the estimators to measure for a net whose labels contain ``part``.

    Conjugate gradients stop after a number of iterations, which is not known beforehand otherwise.
    """
    some: list[Estimator] = [
        UnrolledDifferentiation(horizon=None),
        UnrolledDifferentiation(horizon=None, compile=True),
        InfluenceFunctions(Identity()),
        InfluenceFunctions(EKFAC()),
        InfluenceFunctions(GaussNewton(iterations=10)),
        InfluenceFunctions(GaussNewton("cg", iterations=6, preconditioner=EKFAC())),
        TracIn(),
    ]
    return [one for name, one in zip(labels(some), some, strict=True) if part in name]


def parts(net: str) -> tuple[pl.LightningModule, DataLoader[Any], Any]:
    """Return module, training data and all queries."""
    if net == "demo":
        data = DiabetesData()
        data.setup("fit")
        return DiabetesRegressor(), data.train_dataloader(), data.validation
    train, asked = problems.parts(net)
    return NetModule(net), DataLoader(train, problems.BATCH, shuffle=True), asked


def trainer(net: str, *callbacks: pl.Callback) -> pl.Trainer:
    """Return a quiet Trainer."""
    return pl.Trainer(
        max_epochs=EPOCHS[net], accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=list(callbacks),
    )  # fmt: skip


def quiet() -> None:
    """Use one thread, count CPU seconds, and silence logs."""
    time.perf_counter = time.process_time
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for log in ("lightning_dtda", "lightning.pytorch"):
        logging.getLogger(log).setLevel(logging.ERROR)


class Logged(logging.Handler):
    """Keeps the memory that ``attribute`` announces, such as ``1.5 GiB``."""

    def emit(self, record: logging.LogRecord) -> None:
        """Take it from the message."""
        if found := re.search(r"(about|up to) ([\d.]+) (\w+) of memory", record.getMessage()):
            self.bytes = float(found[2]) * {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}[found[3]]


def announced(net: str, part: str, runs: int, queries: int, results: Any) -> None:
    quiet()
    pl.seed_everything(0, verbose=False)
    module, data, asked = parts(net)
    found = plan(
        module, data, trainer=trainer(net), queries=Subset(asked, range(queries)), runs=runs,
        estimators=estimators(net, part), progress=False,
    )  # fmt: skip
    results.put(found.content())


def recorded(net: str, runs: int, root: Path, results: Any) -> None:
    quiet()
    started = time.process_time()
    for seed in range(runs):
        pl.seed_everything(seed, verbose=False)
        module, data, _ = parts(net)
        trainer(net, TrajectoryRecorder(root)).fit(module, data)
    seconds = time.process_time() - started
    results.put({"seconds": seconds, "disk": sum(one.stat().st_size for one in root.rglob("*") if one.is_file())})


def attributed(net: str, part: str, number: int, queries: int, root: Path, results: Any) -> None:
    quiet()
    log, said = logging.getLogger("lightning_dtda.attribution.resources"), Logged()
    log.setLevel(logging.INFO)
    log.addHandler(said)
    log.propagate = False
    module, data, asked = parts(net)
    with Peak() as peak:
        started = time.process_time()
        attribute(
            Ensemble.open(root), module, data, queries=Subset(asked, range(queries)),
            estimator=estimators(net, part)[number], progress=False,
        )  # fmt: skip
        seconds = time.process_time() - started
    results.put({"seconds": seconds, "memory": peak.own, "logged": said.bytes})


def alone(function: Any, *arguments: Any) -> Any:
    """Call a function in a separate process."""
    context = get_context("spawn")
    results = context.Queue()
    process = context.Process(target=function, args=(*arguments, results))
    process.start()
    found = results.get(timeout=1800)
    process.join()
    return found


def line(net: str, name: str, unit: str, before: float, real: float) -> None:
    print(f"| {net} | {name} | {unit} | {before:.1f} | {real:.1f} | {before / real:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="*", default=list(EPOCHS), choices=list(EPOCHS))
    parser.add_argument("--estimators", default="", help="Only those whose labels contain this.")
    parser.add_argument("--runs", type=int, default=4)
    parser.add_argument("--queries", type=int, default=10)
    options = parser.parse_args()
    print("| net | what | unit | announced | real | ratio |\n|---|---|---|---|---|---|", flush=True)
    for net in options.nets:
        before = alone(announced, net, options.estimators, options.runs, options.queries)
        with tempfile.TemporaryDirectory() as directory:
            root = Path(directory)
            real = alone(recorded, net, options.runs, root)
            line(net, "recording", "s", before["recording"]["seconds"], real["seconds"])
            line(net, "recording, disk", "MiB", before["recording"]["disk"] / 2**20, real["disk"] / 2**20)
            for number, (name, cost) in enumerate(before["estimators"].items()):
                real = alone(attributed, net, options.estimators, number, options.queries, root)
                line(net, name, "s", cost["seconds"], real["seconds"])
                line(net, f"{name}, memory", "MiB", cost["memory"] / 2**20, real["memory"] / 2**20)
                line(net, f"{name}, memory logged", "MiB", real["logged"] / 2**20, real["memory"] / 2**20)


if __name__ == "__main__":
    main()
