"""Cost of a large stored attribution: CPU seconds and peak memory of loading it and of each operation on it.

    pip install -e ".[export]"
    python benchmarks/large_attribution.py --runs 20 --queries 200 --examples 50000

Baseline and responses are random, as their values do not matter here. Each line is a separate process with one thread.
Its memory is its peak beyond that of a process that has only imported the package: ``own`` is what it allocates;
``all`` includes mapped pages of files, which the system reclaims when needed.
"""

import argparse
import re
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from threading import Event, Thread

import torch

from lightning_dtda.attribution.attribution import Attribution
from lightning_dtda.attribution.attribution_store import AttributionStore
from lightning_dtda.attribution.exporting import export
from lightning_dtda.attribution.suggesting import suggest_removals
from lightning_dtda.attribution.trust import sizes


def one(attribution: Attribution) -> Attribution:
    return attribution.select([0])


TASKS: dict[str, Callable[[Attribution, Path], object]] = {
    "load": lambda attribution, scratch: None,
    "top 10 of a query, mean": lambda attribution, scratch: attribution.top(10, "mean", query=0),
    "top 10 of a query, wasserstein": lambda attribution, scratch: attribution.top(10, "wasserstein", query=0),
    "standard error of a query, mean": lambda attribution, scratch: one(attribution).standard_error("mean"),
    "standard error of a query, variance": lambda attribution, scratch: one(attribution).standard_error("variance"),
    "standard error of a query, wasserstein": lambda attribution, scratch: one(attribution).standard_error(
        "wasserstein"
    ),
    "standard error of a query, tail": lambda attribution, scratch: one(attribution).standard_error("tail"),
    "significant of a query, mean": lambda attribution, scratch: one(attribution).significant("mean"),
    "significant of a query, variance": lambda attribution, scratch: one(attribution).significant("variance"),
    "reliability of a query": lambda attribution, scratch: one(attribution).reliability(),
    "predict, 2 examples": lambda attribution, scratch: attribution.predict([3, 17]),
    "suggest removals, a query": lambda attribution, scratch: suggest_removals(attribution, k=3, queries=[0]),
    "influence of all, mean": lambda attribution, scratch: attribution.influence("mean"),
    "influence of all, variance": lambda attribution, scratch: attribution.influence("variance"),
    "reliability of all": lambda attribution, scratch: attribution.reliability(),
    "export of all to Parquet, mean, no intervals": lambda attribution, scratch: export(
        attribution, scratch / "table", differences=["mean"]
    ),
    "export of all to Zarr, mean, no intervals": lambda attribution, scratch: export(
        attribution, scratch / "table", "zarr", ["mean"], overwrite=True
    ),
    "export of all to netCDF, mean, no intervals": lambda attribution, scratch: export(
        attribution, scratch / "table", "netcdf", ["mean"], overwrite=True
    ),
    "joint influence of 5 queries": lambda attribution, scratch: attribution.joint_influence(queries=range(5)),
}


def make(path: Path, runs: int, queries: int, examples: int) -> None:
    generator = torch.Generator().manual_seed(0)
    effects = torch.randn(queries, examples, generator=generator)
    names = {f"seed-{run:04d}": None for run in range(runs)}
    store = AttributionStore.create(path, {"measurement": "loss"}, range(queries), examples, names)
    for run in names:
        responses = 1e-3 * (effects + 3 * torch.randn(queries, examples, generator=generator))
        baseline = torch.rand(queries, generator=generator)
        store.add(run, baseline, responses, {"drift": {}, "adjoint_norms": {}, "diagnosis": {}} | sizes(responses))


def memory(field: str) -> int:
    return int(re.findall(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))[0]) * 1024


class Peak:
    """Measures the peak of private memory (``RssAnon``) every two milliseconds, as the kernel does not record it."""

    def __enter__(self):
        self.start, self.before, self.own, self.done = memory("RssAnon"), memory("VmRSS"), 0, Event()
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        self.thread = Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self):
        """Measure until stopped."""
        while not self.done.wait(0.002):
            self.own = max(self.own, memory("RssAnon") - self.start)

    def __exit__(self, *exception):
        self.done.set()
        self.thread.join()
        self.all = memory("VmHWM") - self.before


def trial(task: str, path: Path, scratch: Path) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    with Peak() as peak:
        started = time.process_time()
        attribution = Attribution.load(path)
        TASKS[task](attribution, scratch)
        seconds = time.process_time() - started
    print(f"| {task} | {seconds:.2f} | {peak.own / 2**20:.0f} | {peak.all / 2**20:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, size in (("runs", 20), ("queries", 200), ("examples", 50_000)):
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()), help="Where the files go.")
    parser.add_argument("--only", nargs="*", default=list(TASKS), choices=TASKS)
    options = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(dir=options.directory))
    size = options.runs * options.queries * options.examples * 4 / 2**20
    try:
        make(scratch / "attribution", options.runs, options.queries, options.examples)
        print(f"{options.runs} runs, {options.queries} queries, {options.examples} examples: {size:.0f} MiB\n")
        print("| | CPU seconds | own MiB | all MiB |\n|---|---|---|---|", flush=True)
        for task in options.only:
            process = get_context("spawn").Process(target=trial, args=(task, scratch / "attribution", scratch))
            process.start()
            process.join()
    finally:
        shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
