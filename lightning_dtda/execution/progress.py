"""The one look of all progress bars."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@contextmanager
def progress_bar(description: str, unit: str, total: int, show: bool = True) -> Iterator[Callable[[float], None]]:
    """Show a progress bar, and yield what has to be told how much more is done.

    Args:
        description: What is done.
        unit: What is counted.
        total: How many there are.
        show: Whether there is a bar at all.
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
