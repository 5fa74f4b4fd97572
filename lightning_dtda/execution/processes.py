"""Several processes on this machine."""

from __future__ import annotations

import functools
import os
import signal
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import cloudpickle
from loky import ProcessPoolExecutor, cpu_count
from typing_extensions import override

from lightning_dtda.errors import ExecutionError
from lightning_dtda.execution.workers import Item, Lost, Result, ThisProcess, Workers
from lightning_dtda.interruption import ended_by_sigterm

_IN_FLIGHT = 2
"""Number of items submitted per process: one that is being worked on and one ready to follow."""

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
"""Variables that limit the threads of torch and NumPy, whichever libraries they were built with."""


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
        first = list(islice(items, _IN_FLIGHT * self.number))
        if not first:
            return
        number = min(self.number, len(first))
        with tempfile.TemporaryDirectory() as directory, ended_by_sigterm():
            # in a file rather than with every item, as it contains the data
            path = Path(directory) / "work.pickle"
            try:
                path.write_bytes(cloudpickle.dumps(work))
            except Exception as reason:  # pickling may raise anything
                raise ExecutionError(
                    f"The work cannot be pickled for other processes ({type(reason).__name__}: {reason}). Create "
                    "objects that cannot be pickled (open files, locks, loggers) inside functions, or set workers=1."
                ) from reason
            # two thread pools on the same cores are many times slower than one thread each
            threads = dict.fromkeys(_THREADS, str(_threads(number)))
            pool = ProcessPoolExecutor(number, initializer=_leave_interrupts, env=threads)
            waiting: dict[Future[Result], Item] = {}
            finished = 0
            try:
                waiting |= {pool.submit(_do, path, item): item for item in first}
                while waiting:
                    done, _ = wait(waiting, return_when=FIRST_COMPLETED)
                    for future in sorted(done, key=lambda each: each.exception() is not None):  # results before errors
                        result = future.result()
                        item = waiting.pop(future)
                        finished += 1
                        # keep the processes busy while the caller deals with the result
                        waiting |= {pool.submit(_do, path, new): new for new in islice(items, 1)}
                        yield item, result
            except BrokenProcessPool as reason:
                raise ExecutionError(
                    f"A process was killed, perhaps because memory ran out, after {finished} tasks were finished. "
                    "If their results are stored on disk, run the call again to continue from there, perhaps with "
                    "fewer workers."
                ) from reason
            finally:
                pool.shutdown(kill_workers=bool(waiting))


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
    return int(wanted) if wanted.isdigit() and int(wanted) > 0 else max(1, cpu_count() // processes)


def _leave_interrupts() -> None:
    # a terminal sends Ctrl+C to all its processes; the one that started the others ends them
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _do(path: Path, item: Any) -> Any:
    return _loaded(path)(item)


@functools.lru_cache(maxsize=1)
def _loaded(path: Path) -> Callable[[Any], Any]:
    return cloudpickle.loads(path.read_bytes())
