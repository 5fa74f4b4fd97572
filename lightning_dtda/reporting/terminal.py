"""What was found, as text: the verdict, one table for all queries, and what to do now."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_dtda.attribution.attribution import Attribution
from lightning_dtda.reporting import wording
from lightning_dtda.reporting.certainty import FDR, LEVEL
from lightning_dtda.reporting.findings import Findings, QueryFindings, Ranked, find
from lightning_dtda.reporting.formatting import escape, supported
from lightning_dtda.reporting.judging import Level
from lightning_dtda.reporting.next_steps import NextStep
from lightning_dtda.reporting.terminal_details import print_details
from lightning_dtda.statistics.differences import Difference, resolve_difference

_MOST_QUERIES = 20
"""Maximum number of queries in the table: what fits one screen. The report shows all."""

_COLUMNS = 100

_ABREAST = 2
"""Number of differences in the table; more of them make more tables."""

_NAME = 16
"""Width up to which names of queries are not cut off."""

_GAP = 2
"""Columns between those of the table."""

_NOT_SIGNIFICANT = "n.s."
_STYLES: dict[Level, str] = {"good": "bold green", "partial": "bold yellow", "poor": "bold red"}


def print_summary(
    found: Attribution | Findings,
    k: int = 5,
    differences: Sequence[str | Difference] | None = None,
    *,
    verbose: bool = False,
    progress: bool = False,
    console: Console | None = None,
) -> None:
    """Print the verdict, the example or group that matters most to each query, and what to do now.

    If there are more than 20 queries, the table has those with the most significant influences.

    Args:
        found: An attribution, or what :func:`~lightning_dtda.reporting.find` found in it.
        k: With ``verbose``, number of examples, or groups, for each of three queries.
        differences: As for :meth:`Attribution.influence <lightning_dtda.Attribution.influence>`, for an attribution.
            ``None`` means mean and spread.
        verbose: Whether to print how the question was answered, and the top examples, or groups, of three queries.
        progress: Whether to show a progress bar if it takes more than a few seconds.
        console: Console to print to. Defaults to standard output.

    Raises:
        AttributionError: If ``k`` is less than one, a difference is unknown, or it needs more runs.
    """
    if isinstance(found, Attribution):
        names = [resolve_difference(name) for name in found.independent().trusted().available_differences]
        found = find(found, k, differences or [each for each in names if each.signed], progress)
    console = console or Console()
    width = min(console.width, _COLUMNS)

    def say(text: str, style: str | None = None) -> None:
        console.print(escape(text), width=width, highlight=False, style=style)

    say(found.question, style="bold")
    say(f"{found.verdict.sign} {found.verdict.sentence}", style=_STYLES[found.verdict.level])
    for caution in found.cautions:
        console.print(f"[yellow]Caution.[/] {escape(caution)}", width=width, highlight=False)
    if verbose:
        print_details(found, console, width, k)
    shown = sorted(found.most_interesting[:_MOST_QUERIES])
    for start in range(0, len(found.queries[0].ranked), _ABREAST):
        console.print()
        console.print(_table(found, [found.queries[query] for query in shown], start, width), width=width)
    if found.sources is not None:
        console.print()
        say("Where the variance comes from", style="bold")
        for sentence in found.sources.said:
            say(sentence)
    what, size = wording.noun(found.attribution), found.attribution.responses.shape[2]
    fewer = f"The {len(shown)} of {len(found.queries)} queries with the most significant influences. "
    say(
        f"{fewer * (len(shown) < len(found.queries))}In brackets: {100 * LEVEL:g} % intervals over seeds. "
        f"{_NOT_SIGNIFICANT}: not significant among {size} {what}s (false discovery rate {100 * FDR:g} %).",
        style="dim",
    )
    console.print()
    say("Next", style="bold")
    for number, step in enumerate(found.next_steps, start=1):
        _print_step(number, step, console, width)


def _table(found: Findings, queries: Sequence[QueryFindings], start: int, width: int) -> Table:
    """Return a table with the top removal of each query, by some of the differences."""
    removed, measurement = wording.noun(found.attribution), found.attribution.measurement
    part = slice(start, start + _ABREAST)
    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, _GAP - 1, 0, 0), pad_edge=False)
    names = [query.name.removeprefix("query ") for query in queries]
    table.add_column("query", no_wrap=True, overflow="ellipsis", max_width=_NAME)
    table.add_column(escape(f"{measurement}\nas trained"), no_wrap=True, overflow="ellipsis", max_width=_NAME)
    columns = [
        [_cell(each) for each in of_queries] for of_queries in zip(*(q.ranked[part] for q in queries), strict=True)
    ]
    taken = min(_NAME, max(map(len, ["query", *names]))) + min(_NAME, max(len(q.as_trained.value) for q in queries))
    room = (width - taken - _GAP * (2 + len(columns))) // len(columns)
    for ranked, cells in zip(queries[0].ranked[part], columns, strict=True):
        head = escape(f"{removed}: {ranked.words.short}{' (%)' * ranked.difference.relative}")
        # cells are not wrapped where there is room; rich would give the columns equal shares of what is missing
        table.add_column(head, min_width=min(room, max(Text.from_markup(cell).cell_len for cell in cells)))
    for name, query, *row in zip(names, queries, *columns, strict=True):
        table.add_row(escape(name), escape(query.as_trained.value), *row)
    return table


def _cell(ranked: Ranked) -> str:
    """Return the top removal and its influence, with interval."""
    row, title = ranked.rows[0], ranked.cards[0].title
    value, low, high = supported(row.influence, row.interval_low, row.interval_high)
    interval = "" if math.isnan(row.interval_low) else f" [{low}, {high}]"
    mark = wording.OUT_OF_RANGE * bool(row.out_of_range)
    cell = escape(f"{mark}{title.removeprefix('example ')}: {value}{interval}")
    return cell if row.significant else f"[dim]{cell} {_NOT_SIGNIFICANT}[/]"


def _print_step(number: int, step: NextStep, console: Console, width: int) -> None:
    console.print(escape(f"{number}. {step.title}. {step.cost}"), width=width, highlight=False)
    for command in step.commands:
        # not wrapped: a command with line breaks in it cannot be copied
        console.print(escape(f"   {command}"), style="cyan", highlight=False, soft_wrap=True)
