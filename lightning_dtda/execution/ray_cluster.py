"""A Ray cluster; what is lost with a worker or a node is done again."""

from __future__ import annotations

import functools
import logging
import os
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

_log = logging.getLogger(__name__)

_IN_FLIGHT = 2
"""Items handed out for each place on the cluster: one at work and one that is there when it is done."""


@dataclass(frozen=True)
class RayCluster(Workers):
    """The nodes of a Ray cluster, and what each piece of work gets there.

    A cluster that this process is connected to is used. Else one is connected to, at ``address``, at ``RAY_ADDRESS``
    or on this machine if ``ray start`` was called there; if there is none, Ray is started on this machine and stopped
    when the work is done.

    Args:
        cpus: CPUs, and threads, for each piece of work.
        gpus: GPUs for each; a fraction shares one.
        address: Of a running cluster; ``"local"`` starts one on this machine in any case.
        retries: How often an item is done again whose worker was lost. 3 is what Ray does with its own tasks; unlike
            those, workers that were killed for their memory count.

    Raises:
        ExecutionError: If Ray is not installed, or a number makes no sense.
    """

    cpus: float = 1.0
    gpus: float = 0.0
    address: str | None = None
    retries: int = 3

    def __post_init__(self) -> None:
        for name, number in (("cpus", self.cpus), ("gpus", self.gpus)):
            if number < 0 or (number > 1 and number != int(number)):
                raise ExecutionError(f"{name}={number}; give a fraction up to 1, or a whole number.")
        if self.cpus == self.gpus == 0:
            raise ExecutionError("cpus=0, gpus=0; what needs nothing would all be done at once. Give one of them.")
        if self.retries < 0:
            raise ExecutionError(f"retries={self.retries}; give how often lost work is done again, from 0 on.")
        _ray()

    @override
    def run(self, work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[tuple[Item, Result | Lost]]:
        """Do work for each item, and yield what is finished as soon as it is, in any order; each item once.

        Items are asked for as places become free, so that there may be any number of them. When the iterator is
        closed, what is under way is stopped.

        Args:
            work: Sent once to each worker, with all that it holds. It should not raise; if it does, that is the end.
            items: Arguments of ``work``, hashable.

        Raises:
            ExecutionError: If there is no cluster; if ``work`` cannot be sent or raises; or inside a Ray task.
        """
        content = _pickled(work)
        ray = _ray()
        with self._connected(ray):
            yield from self._run(ray, content, iter(items))

    @override
    def places(self) -> int:
        needs = {"CPU": self.cpus, "GPU": self.gpus}
        nodes = [node["Resources"] for node in _ray().nodes() if node["Alive"]]
        return sum(min(int(node.get(kind, 0) / number) for kind, number in needs.items() if number) for node in nodes)

    def _run(self, ray: Any, content: bytes, items: Iterator[Any]) -> Iterator[tuple[Any, Any]]:
        # not Ray's own max_retries: those do not count workers killed for their memory, which it tries again for ever
        do = ray.remote(num_cpus=self.cpus, num_gpus=self.gpus, max_retries=0)(_do)
        # in the object store, not with every task: it holds the data
        reference = ray.put(content)
        lost: deque[Any] = deque()
        losses: Counter[Any] = Counter()
        running: dict[Any, Any] = {}
        end = object()
        if not self.places():
            # no error: there are clusters that start a node when something waits for one
            _log.warning(
                "No node of the Ray cluster has %g CPUs and %g GPUs, which each piece of work needs: waiting for one.",
                self.cpus,
                self.gpus,
            )
        try:
            while True:
                # nodes come and go, and a cluster that grows by itself does so for what waits
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
                    "This is a task or an actor of Ray, which would hold its CPUs and wait for others. Call from the "
                    "program that connects to the cluster; in here, train without Ray."
                )
            yield
            return
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            ray.init(address=self.address, include_dashboard=False, logging_level=logging.WARNING)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ExecutionError(
                f"Ray cannot be connected to or started (address={self.address!r}, RAY_ADDRESS="
                f"{os.environ.get('RAY_ADDRESS')!r}; {type(error).__name__}: {error}). Start a cluster with ray start "
                '--head, or give address="local".'
            ) from error
        try:
            yield
        finally:
            ray.shutdown()


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise ExecutionError(f'This needs Ray ({error}). pip install "lightning-dtda[ray]"') from error
    return ray


def _pickled(work: Any) -> bytes:
    # functions can be sent no other way, and Ray itself sends them so; it stays within the cluster that is called,
    # which runs what it is sent in any case, and none of it gets into a file of ours
    try:
        return bytes(cloudpickle.dumps(work))
    except Exception as error:  # whatever cannot be pickled
        raise ExecutionError(
            f"What is to be done cannot be sent to the workers of Ray ({type(error).__name__}: {error}). Let functions "
            "make what has no pickle (open files, locks, loggers), inside of them."
        ) from error


def _result(ray: Any, task: Any) -> Any:
    try:
        return ray.get(task)
    except ray.exceptions.RayTaskError as error:  # what was raised in the worker
        cause = error.cause or error
        raise ExecutionError(
            f"A worker of Ray cannot do this ({type(cause).__name__}: {cause}). Its node must have the packages, "
            'modules and files that are needed; ray.init(runtime_env={"working_dir": "."}) beforehand sends it those '
            "next to a script."
        ) from error
    except ray.exceptions.RayError as error:  # what became of the worker itself
        return Lost(f"{type(error).__name__}: {str(error).strip()}")


def _do(content: list[Any], item: Any, threads: int) -> Any:
    # two thread pools on the same cores are many times slower than one thread each
    torch.set_num_threads(threads)
    return _loaded(content[0])(item)


@functools.lru_cache(maxsize=1)
def _loaded(content: Any) -> Callable[[Any], Any]:
    return cloudpickle.loads(_ray().get(content))
