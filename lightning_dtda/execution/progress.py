"""Progress bars, with one look everywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@contextmanager
def progress_bar(description: str, unit: str, total: int, show: bool = True) -> Iterator[Callable[[float], None]]:
    """Show a progress bar, and yield a function that advances it by an amount.

    Args:
        description: Description of the work.
        unit: Unit of the count.
        total: Total number of units.
        show: Whether to show the bar.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, disable=not show) as bar:
        task = bar.add_task(description, total=total)
        yield lambda done: bar.advance(task, done)
