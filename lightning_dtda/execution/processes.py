"""Many independent pieces of work in several processes of this machine."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

import cloudpickle
import joblib

from lightning_dtda.errors import DTDAError

Item = TypeVar("Item")
Result = TypeVar("Result")


def run_in_processes(
    work: Callable[[Item], Result], items: Sequence[Item], jobs: int, noun: str, error: type[DTDAError]
) -> Iterator[tuple[Item, Result]]:
    """Do work for each item, and yield what is finished as soon as it is, in any order.

    Args:
        work: Sent once to each process, with all that it holds. What it raises is raised here.
        items: Its arguments.
        jobs: Number of processes.
        noun: What the items are, for messages: trainings, say.
        error: Raised if the work has no pickle or a process is killed.
    """
    # two thread pools on the same cores are many times slower than one thread each
    threads = int(os.environ.get("OMP_NUM_THREADS", max(1, (os.cpu_count() or 1) // jobs)))
    with tempfile.TemporaryDirectory() as directory:
        # in a file, not with every item: it holds the data
        path = Path(directory) / "work.pickle"
        try:
            path.write_bytes(cloudpickle.dumps(work))
        except Exception as reason:  # whatever cannot be pickled
            raise error(
                f"Module, data, trainer or measurement cannot be sent to other processes ({type(reason).__name__}: "
                f"{reason}). Let functions make what has no pickle (open files, locks, loggers), or set jobs=1."
            ) from reason
        finished = 0
        with joblib.parallel_config("loky", n_jobs=jobs, inner_max_num_threads=threads):
            results = joblib.Parallel(return_as="generator_unordered", batch_size=1)(
                joblib.delayed(_do)(path, item) for item in items
            )
            try:
                for result in results:
                    finished += 1
                    yield result
            except BrokenProcessPool as reason:
                raise error(
                    f"A process was killed after {finished} of {len(items)} {noun} (out of memory?). Those are on "
                    "disk if there is an output: call again, perhaps with fewer jobs, to go on."
                ) from reason


def _do(path: Path, item: Any) -> tuple[Any, Any]:
    return item, _loaded(path)(item)


@functools.lru_cache(maxsize=1)
def _loaded(path: Path) -> Callable[[Any], Any]:
    return cloudpickle.loads(path.read_bytes())
