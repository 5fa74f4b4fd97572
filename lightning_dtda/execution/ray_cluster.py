"""A Ray cluster; work lost with a worker or a node is repeated."""

from __future__ import annotations

import functools
import logging
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import cloudpickle
import torch
from typing_extensions import override

from lightning_dtda.errors import ExecutionError
from lightning_dtda.execution.workers import Item, Lost, Result, Workers
from lightning_dtda.interruption import Terminated, ended_by_sigterm
from lightning_dtda.units import is_quantity

_log = logging.getLogger(__name__)

_IN_FLIGHT = 2
"""Number of items submitted per place on the cluster: one running and one ready to follow."""


@dataclass(frozen=True)
class RayCluster(Workers):
    """The nodes of a Ray cluster, and the resources of each task there.

    If this process is connected to a cluster, that cluster is used. Otherwise it connects to the one at ``address``, at
    ``RAY_ADDRESS``, or on this machine if ``ray start`` was called there. If there is none, Ray is started on this
    machine and stopped when the work is done.

    Args:
        cpus: Number of CPUs, and threads, for each task.
        gpus: Number of GPUs for each task; tasks with a fraction share one.
        address: Address of a running cluster; ``"local"`` always starts one on this machine.
        retries: Number of times an item is repeated after its worker was lost. The default of 3 is that of Ray's own
            tasks; unlike there, workers killed for their memory use count.

    Raises:
        ExecutionError: If Ray is not installed, or a number is invalid.
    """

    cpus: float = 1.0
    gpus: float = 0.0
    address: str | None = None
    retries: int = 3

    def __post_init__(self) -> None:
        for name, number in (("cpus", self.cpus), ("gpus", self.gpus)):
            if not is_quantity(number) or number < 0 or (number > 1 and number != int(number)):
                raise ExecutionError(f"{name}={number!r}; give a fraction up to 1, or a whole number.")
        if self.cpus == self.gpus == 0:
            raise ExecutionError("cpus=0, gpus=0; all tasks would run at once. Set at least one of them above 0.")
        if not (is_quantity(self.retries, whole=True) and self.retries >= 0):
            raise ExecutionError(f"retries={self.retries!r}; give how often to repeat lost work, 0 or more.")
        _ray()

    @override
    def run(self, work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[tuple[Item, Result | Lost]]:
        """Do the work for each item, and yield each item with its result as soon as it is finished, in any order.

        Items are taken as places become free, so there may be any number of them. Closing the iterator stops the tasks
        that are running.

        Args:
            work: Function to run, sent once to each worker with everything it references. If it raises, all work ends.
            items: Arguments of ``work``, hashable.

        Raises:
            ExecutionError: If there is no cluster, ``work`` cannot be pickled or raises, or this is inside a Ray task.
        """
        content = _pickled(work)
        ray = _ray()
        with ended_by_sigterm(), self._connected(ray):
            try:
                yield from self._run(ray, content, iter(items))
            except SystemExit:
                # Ray, while it waits, replaces what the handler of a signal raises by an exit with code 1
                if signal.getsignal(signal.SIGTERM) == signal.SIG_IGN:
                    raise Terminated from None
                raise

    @override
    def places(self) -> int:
        needs = {"CPU": self.cpus, "GPU": self.gpus}
        nodes = [node["Resources"] for node in _ray().nodes() if node["Alive"]]
        return sum(min(int(node.get(kind, 0) / number) for kind, number in needs.items() if number) for node in nodes)

    def _run(self, ray: Any, content: bytes, items: Iterator[Any]) -> Iterator[tuple[Any, Any]]:
        # not Ray's max_retries, which does not count workers killed for their memory use: it would retry them forever
        do = ray.remote(num_cpus=self.cpus, num_gpus=self.gpus, max_retries=0)(_do)
        # in the object store rather than with every task, as it contains the data
        reference = ray.put(content)
        lost: deque[Any] = deque()
        losses: Counter[Any] = Counter()
        running: dict[Any, Any] = {}
        end = object()
        if not self.places():
            # not an error: some clusters start a node when a task waits for one
            _log.warning(
                "No node of the Ray cluster has the %g CPUs and %g GPUs that each task needs; waiting for one.",
                self.cpus,
                self.gpus,
            )
        try:
            while True:
                # nodes come and go, and an autoscaling cluster grows for waiting tasks
                for _ in range(_IN_FLIGHT * max(1, self.places()) - len(running)):
                    # in a list: a bare reference would be fetched for every task
                    item = lost.popleft() if lost else next(items, end)
                    if item is end:
                        break
                    running[do.remote([reference], item, max(1, int(self.cpus)))] = item
                if not running:
                    return
                ray.wait(list(running), num_returns=1)
                ready, _ = ray.wait(list(running), num_returns=len(running), timeout=0)
                for task in ready:
                    item = running.pop(task)
                    result = _result(ray, task)
                    if isinstance(result, Lost):
                        losses[item] += 1
                        _log.warning("The worker of %s was lost (%s).", item, result.reason)
                        if losses[item] <= self.retries:
                            lost.append(item)
                            continue
                        result = Lost(f"its worker was lost (attempts: {losses[item]}; {result.reason})")
                    yield item, result
        finally:
            for task in running:
                ray.cancel(task, force=True)

    @contextmanager
    def _connected(self, ray: Any) -> Iterator[None]:
        if ray.is_initialized():
            if ray.get_runtime_context().worker.mode == ray.WORKER_MODE:
                raise ExecutionError(
                    "RayCluster cannot be used inside a Ray task or actor, which would hold its CPUs while waiting for "
                    "others. Call this from the program that connects to the cluster, or use no RayCluster here."
                )
            yield
            return
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        handler = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(address=self.address, include_dashboard=False, logging_level=logging.WARNING)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ExecutionError(
                f"Cannot connect to Ray or start it (address={self.address!r}, RAY_ADDRESS="
                f"{os.environ.get('RAY_ADDRESS')!r}; {type(error).__name__}: {error}). Start a cluster with ray start "
                '--head, or set address="local".'
            ) from error
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray sets one that exits with code 15
        try:
            yield
        finally:
            ray.shutdown()


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise ExecutionError(
            f'RayCluster needs Ray ({error}). Install it with: pip install "lightning-dtda[ray]"'
        ) from error
    return ray


def _pickled(work: Any) -> bytes:
    # functions cannot be sent any other way, and Ray sends them like this too. The pickle stays within the cluster,
    # which runs whatever it is sent anyway, and none of it gets into our files
    try:
        return bytes(cloudpickle.dumps(work))
    except Exception as error:  # pickling may raise anything
        raise ExecutionError(
            f"The work cannot be pickled for the Ray workers ({type(error).__name__}: {error}). Create objects that "
            "cannot be pickled (open files, locks, loggers) inside functions."
        ) from error


def _result(ray: Any, task: Any) -> Any:
    try:
        return ray.get(task)
    except ray.exceptions.RayTaskError as error:  # raised by the work
        cause = error.cause or error
        raise ExecutionError(
            f"The work failed on a Ray worker ({type(cause).__name__}: {cause}). Its node must have all the packages, "
            'modules and files needed; call ray.init(runtime_env={"working_dir": "."}) first to send it those next to '
            "your script."
        ) from error
    except ray.exceptions.RayError as error:  # the worker itself was lost
        return Lost(f"{type(error).__name__}: {str(error).strip()}")


def _do(content: list[Any], item: Any, threads: int) -> Any:
    # two thread pools on the same cores are many times slower than one thread each
    torch.set_num_threads(threads)
    return _loaded(content[0])(item)


@functools.lru_cache(maxsize=1)
def _loaded(content: Any) -> Callable[[Any], Any]:
    return cloudpickle.loads(_ray().get(content))
