"""Workers for many independent tasks: one interface for this process, several processes, and clusters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from typing_extensions import override

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Lost:
    """Result of an item whose worker was lost on every attempt.

    Args:
        reason: Number of attempts, and what is known about the last one.
    """

    reason: str


class Workers(ABC):
    """Where work runs.

    To add a kind, write a subclass and pass an instance, or on the command line
    ``--workers my.package.Slurm --workers.nodes 3``.
    """

    @abstractmethod
    def run(self, work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[tuple[Item, Result | Lost]]:
        """Do the work for each item, and yield each item with its result as soon as it is finished, in any order.

        Closing the iterator stops the tasks that are running.

        Args:
            work: Function to run, sent once to each worker with everything it references unless it runs in this
                process.
            items: Arguments of ``work``, hashable; none is taken before :meth:`places` is known.

        Raises:
            ExecutionError: If the workers are not available, ``work`` cannot be sent to them, or they were lost.
        """

    @abstractmethod
    def places(self) -> int:
        """Return the number of tasks that run at once; for a cluster, only while it is in use."""

    def processes_here(self) -> int:
        """Return the minimum number of processes on this machine that share its memory."""
        return 1


class ThisProcess(Workers):
    """This process, one task after the other. Exceptions are raised here."""

    @override
    def run(self, work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[tuple[Item, Result | Lost]]:
        for item in items:
            yield item, work(item)

    @override
    def places(self) -> int:
        return 1
