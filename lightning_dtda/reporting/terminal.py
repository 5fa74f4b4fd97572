"""What an attribution found, in a hundred columns."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lightning_dtda.attribution.attribution import Attribution
from lightning_dtda.reporting import wording
from lightning_dtda.reporting.certainty import FDR, LEVEL
from lightning_dtda.reporting.findings import (
    TopExample,
    most_interesting,
    significance_on,
    top_examples,
    without_repeated_warnings,
)
from lightning_dtda.reporting.formatting import common_exponent, number, unit
from lightning_dtda.reporting.verdicts import retraining_verdict, verdict
from lightning_dtda.reporting.wording import describe
from lightning_dtda.statistics.differences import DIFFERENCES, Difference, resolve_difference

MOST_QUERIES = 3
"""Queries in a summary: what fits one screen. The report shows more."""

_COLUMNS = 100

_ABREAST = 2
"""Differences that stand side by side; more of them make more tables."""


def print_summary(
    attribution: Attribution,
    k: int = 5,
    differences: Sequence[str | Difference] | None = None,
    *,
    console: Console | None = None,
) -> None:
    """Print what was asked, how sure the answer is, and the top examples, or groups, of a few queries.

    Of more than :data:`MOST_QUERIES` queries those are printed on which one removal changes the variance most.

    Args:
        attribution: The attribution.
        k: Examples, or groups, for each query.
        differences: As for :meth:`Attribution.influence <lightning_dtda.Attribution.influence>`; ``None`` is mean and
            variance: of the paper's, those that say which way.
        console: Where to print; the standard output if not given.

    Raises:
        AttributionError: If ``k`` is less than one, or there is no such difference or too few runs for it.
    """
    console = console or Console()
    width = min(console.width, _COLUMNS)
    say = partial(console.print, width=width, highlight=False)
    say(f"[bold]{escape(wording.question(attribution))}[/]")
    say(escape(wording.answer(attribution)))
    say(f"Largest replay drift of a run: {wording.drift(attribution)} (relative).")
    cautions = wording.cautions(attribution)
    attribution = attribution.trusted()
    paper = [DIFFERENCES[name] for name in attribution.available_differences]
    chosen = [resolve_difference(each) for each in differences or []] or [each for each in paper if each.signed]
    say(f"Largest error of responses, on a sample of steps: {wording.diagnosis(attribution)} (relative).")
    with without_repeated_warnings():
        agreement = wording.reliability(attribution)
        say(f"Agreement of the runs about the mean influence (split-half reliability): {agreement}.")
        for caution in cautions:
            say(f"[yellow]Caution.[/] {escape(caution)}")
        shown = most_interesting(attribution, MOST_QUERIES)
        for query in shown:
            console.print()
            tests = [significance_on(attribution, query, difference) for difference in chosen]
            tops = [top_examples(attribution, query, each.difference, k, each) for each in tests]
            for start in range(0, len(chosen), _ABREAST):
                part = slice(start, start + _ABREAST)
                table = _table(attribution, query, chosen[part], tops[part], beside=width >= _COLUMNS)
                console.print(table, width=width)
            for each, top in zip(tests, tops, strict=True):
                say(escape(f"{verdict(attribution, each)} {retraining_verdict(attribution, top[0])}".strip()))
    console.print()
    notes = (
        f"In brackets: {100 * LEVEL:g} % interval over seeds (bootstrap). Dim, with a dot: not told from seed noise "
        f"among all {wording.noun(attribution)}s (false discovery rate {100 * FDR:g} %)."
    )
    if len(shown) < len(attribution.queries):
        notes += f" {len(shown)} of {len(attribution.queries)} queries, those with the largest variance influence."
    say(notes, style="dim")


def _table(
    attribution: Attribution,
    query: int,
    differences: Sequence[Difference],
    tops: Sequence[Sequence[TopExample]],
    beside: bool,
) -> Table:
    """Return one query's top removals by some differences, side by side.

    Intervals stand beside influences or, where that is too wide, beneath them.
    """
    separator = " " if beside else "\n"
    table = Table(title=f"Query {attribution.queries[query]}", title_justify="left", box=SIMPLE_HEAD, show_edge=False)
    columns: list[list[str]] = []
    for difference, rows in zip(differences, tops, strict=True):
        exponent = common_exponent(end for row in rows for end in (row.influence, row.interval_low, row.interval_high))
        values = [_with_interval(row, exponent, separator) for row in rows]
        words = describe(difference, attribution.measurement, wording.noun(attribution))
        head = f"{words.short} {unit(exponent)}"
        table.add_column("example" if attribution.removals is None else "group (examples)", justify="right")
        table.add_column(escape(head), justify="right")
        columns.append([_shade(_label(attribution, row), row.significant) for row in rows])
        columns.append([_shade(value, row.significant) for value, row in zip(values, rows, strict=True)])
    for cells in zip(*columns, strict=True):
        table.add_row(*cells)
    return table


def _with_interval(row: TopExample, exponent: int, separator: str) -> str:
    value, low, high = (number(part, exponent) for part in (row.influence, row.interval_low, row.interval_high))
    return escape(f"{value}{separator}[{low}, {high}]")


def _label(attribution: Attribution, row: TopExample) -> str:
    return row.name if attribution.removals is None else escape(f"{row.name} ({row.size})")


def _shade(text: str, told: bool) -> str:
    return text if told else f"[dim]·{text}[/]"
