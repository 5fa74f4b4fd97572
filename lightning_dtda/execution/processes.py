"""Several processes on this machine."""

from __future__ import annotations

import functools
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import cloudpickle
import joblib
from typing_extensions import override

from lightning_dtda.errors import ExecutionError
from lightning_dtda.execution.workers import Item, Lost, Result, ThisProcess, Workers


@dataclass(frozen=True)
class Processes(Workers):
    """Processes on this machine. An exception raised in one of them is raised here.

    They share the CPUs evenly unless ``OMP_NUM_THREADS`` sets the number of threads of each.

    Args:
        number: Number of processes.

    Raises:
        ExecutionError: If the number is not a positive integer.
    """

    number: int

    def __post_init__(self) -> None:
        if isinstance(self.number, bool) or not isinstance(self.number, int) or self.number < 1:
            raise ExecutionError(
                f"workers={self.number!r}; give a number of processes on this machine, at least 1, or a Workers object "
                "such as RayCluster(cpus=1)."
            )

    @override
    def places(self) -> int:
        return self.number

    @override
    def processes_here(self) -> int:
        return self.number

    @override
    def run(self, work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[tuple[Item, Result | Lost]]:
        items = iter(items)
        first = list(islice(items, self.number))
        if not first:
            return
        # two thread pools on the same cores are many times slower than one thread each
        threads = _threads(len(first))
        with tempfile.TemporaryDirectory() as directory, _ended_by_sigterm():
            # in a file rather than with every item, as it contains the data
            path = Path(directory) / "work.pickle"
            try:
                path.write_bytes(cloudpickle.dumps(work))
            except Exception as reason:  # pickling may raise anything
                raise ExecutionError(
                    f"The work cannot be pickled for other processes ({type(reason).__name__}: {reason}). Create "
                    "objects that cannot be pickled (open files, locks, loggers) inside functions, or set workers=1."
                ) from reason
            finished = 0
            with joblib.parallel_config("loky", n_jobs=len(first), inner_max_num_threads=threads):
                results = joblib.Parallel(return_as="generator_unordered", batch_size=1)(
                    joblib.delayed(_do)(path, item) for item in chain(first, items)
                )
                try:
                    for result in results:
                        finished += 1
                        yield result
                except BrokenProcessPool as reason:
                    raise ExecutionError(
                        f"A process was killed, perhaps because memory ran out, after {finished} tasks were finished. "
                        "If their results are stored on disk, run the call again to continue from there, perhaps with "
                        "fewer workers."
                    ) from reason


def workers_of(workers: int | Workers) -> Workers:
    """Return the workers for the ``workers`` argument of ``record``, ``attribute`` and ``retrain``.

    Raises:
        ExecutionError: If it is neither a number of processes nor a :class:`Workers`.

    Example:
        >>> workers_of(2)
        Processes(number=2)
    """
    if isinstance(workers, Workers):
        return workers
    processes = Processes(workers)
    return processes if processes.number > 1 else ThisProcess()


def _threads(processes: int) -> int:
    """Return the number of threads of each process: as the environment says, or its share of the usable CPUs."""
    wanted = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()  # OpenMP takes a list, one for each level
    return int(wanted) if wanted.isdigit() and int(wanted) > 0 else max(1, joblib.cpu_count() // processes)


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end this process as Ctrl+C does; an immediate end would leave the other processes running."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set signal handlers
        yield
        return

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _do(path: Path, item: Any) -> tuple[Any, Any]:
    return item, _loaded(path)(item)


@functools.lru_cache(maxsize=1)
def _loaded(path: Path) -> Callable[[Any], Any]:
    return cloudpickle.loads(path.read_bytes())
