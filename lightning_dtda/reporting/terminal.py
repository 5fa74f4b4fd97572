"""What an attribution found, in a hundred columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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

MOST_QUERIES = 3
"""Queries in a summary: what fits one screen. The report shows more."""

_COLUMNS = 100

_HEADS = {"mean": "change of the mean {} if removed", "variance": "change of the {}'s variance if removed"}


def print_summary(attribution: Attribution, k: int = 5, *, console: Console | None = None) -> None:
    """Print what was asked, how sure the answer is, and the top examples, or groups, of a few queries.

    Of more than :data:`MOST_QUERIES` queries those are printed on which one removal changes the variance most.

    Args:
        attribution: The attribution.
        k: Examples, or groups, for each query.
        console: Where to print; the standard output if not given.

    Raises:
        AttributionError: If ``k`` is less than one.
    """
    console = console or Console()
    width = min(console.width, _COLUMNS)
    say = partial(console.print, width=width, highlight=False)
    say(f"[bold]{escape(wording.question(attribution))}[/]")
    say(escape(wording.answer(attribution)))
    say(f"Largest replay drift of a run: {wording.drift(attribution)} (relative).")
    cautions = wording.cautions(attribution)
    attribution = attribution.trusted()
    # mean and variance say which way, the distance does not
    differences = [name for name in attribution.available_differences if name in _HEADS]
    say(f"Largest error of responses, on a sample of steps: {wording.diagnosis(attribution)} (relative).")
    with without_repeated_warnings():
        agreement = wording.reliability(attribution)
        say(f"Agreement of the runs about the mean influence (split-half reliability): {agreement}.")
        for caution in cautions:
            say(f"[yellow]Caution.[/] {escape(caution)}")
        shown = most_interesting(attribution, MOST_QUERIES)
        for query in shown:
            console.print()
            tests = {name: significance_on(attribution, query, name) for name in differences}
            top = {name: top_examples(attribution, query, name, k, tests[name]) for name in tests}
            console.print(_table(attribution, query, top, beside=width >= _COLUMNS), width=width)
            for name in tests:
                verdicts = verdict(attribution, tests[name]), retraining_verdict(attribution, top[name][0])
                say(escape(" ".join(verdicts).strip()))
    console.print()
    notes = (
        f"In brackets: {100 * LEVEL:g} % interval over seeds (bootstrap). Dim, with a dot: not told from seed noise "
        f"among all {wording.noun(attribution)}s (false discovery rate {100 * FDR:g} %)."
    )
    if len(shown) < len(attribution.queries):
        notes += f" {len(shown)} of {len(attribution.queries)} queries, those with the largest variance influence."
    say(notes, style="dim")


def _table(attribution: Attribution, query: int, top: Mapping[str, Sequence[TopExample]], beside: bool) -> Table:
    """Return one query's top removals, by mean and by variance side by side.

    Intervals stand beside influences or, where that is too wide, beneath them.
    """
    separator = " " if beside else "\n"
    table = Table(title=f"Query {attribution.queries[query]}", title_justify="left", box=SIMPLE_HEAD, show_edge=False)
    columns: list[list[str]] = []
    for difference, rows in top.items():
        exponent = common_exponent(end for row in rows for end in (row.influence, row.interval_low, row.interval_high))
        values = [_with_interval(row, exponent, separator) for row in rows]
        head = f"{_HEADS[difference].format(attribution.measurement)} {unit(exponent)}"
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
