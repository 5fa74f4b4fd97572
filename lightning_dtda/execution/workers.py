"""What does many independent pieces of work: one interface for this process, for several, and for clusters."""

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
    """Stands for the result of an item whose worker was lost each time.

    Args:
        reason: How often, and what is known of the last time.
    """

    reason: str


class Workers(ABC):
    """Where work is done.

    A new kind is a subclass: pass an instance, or on the command line ``--workers my.package.Slurm --workers.nodes 3``.
    """

    @abstractmethod
    def run(self, work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[tuple[Item, Result | Lost]]:
        """Do work for each item, and yield what is finished as soon as it is, in any order; each item once.

        When the iterator is closed, what is under way is stopped.

        Args:
            work: Sent once to each worker, with all that it holds, unless that is this process.
            items: Arguments of ``work``, hashable; the first is asked for when :meth:`places` is known.

        Raises:
            ExecutionError: If there are no such workers, ``work`` cannot be sent to them, or they were lost.
        """

    @abstractmethod
    def places(self) -> int:
        """Return how many pieces of work are done at a time; of a cluster, while work is done there."""

    def processes_here(self) -> int:
        """Return how many processes of this machine, at least, share its memory."""
        return 1


class ThisProcess(Workers):
    """One piece of work after the other, in this process; what it raises is raised here."""

    @override
    def run(self, work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[tuple[Item, Result | Lost]]:
        for item in items:
            yield item, work(item)

    @override
    def places(self) -> int:
        return 1
