"""The details behind a summary in the terminal: how the question was answered, and each query's top removals."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lightning_dtda.attribution.attribution import Attribution
from lightning_dtda.reporting import wording
from lightning_dtda.reporting.certainty import FDR, LEVEL, PLANNING, POWER
from lightning_dtda.reporting.findings import Findings, Ranked
from lightning_dtda.reporting.formatting import capital, common_exponent, escape, number, unit
from lightning_dtda.reporting.rows import TopExample

_MOST_QUERIES = 3
"""Maximum number of queries with details: what fits one screen. The report shows all."""

_BESIDE = 100
"""Number of columns from which intervals stand beside the influences."""

_ABREAST = 2
"""Number of differences side by side; more of them make more tables."""

_NAME = 24
"""Width up to which the name of a group is not wrapped."""

_NOT_SIGNIFICANT = "n.s."


def print_details(found: Findings, console: Console, width: int, k: int) -> None:
    """Print how the question was answered, the errors of the replay, and the top removals of a few queries.

    Args:
        found: The findings.
        console: Console to print to.
        width: Number of columns.
        k: Number of removals for each query.
    """

    def say(text: str, style: str | None = None) -> None:
        console.print(escape(text), width=width, highlight=False, style=style)

    attribution, trusted = found.attribution, found.attribution.trusted()
    what = wording.noun(attribution)
    say(found.answer)
    say(f"Largest relative replay drift of a run: {wording.drift(attribution)}.")
    say(f"Largest relative error of responses on a sample of steps: {wording.diagnosis(trusted)}.")
    say(f"Agreement between runs on the mean influence (split-half reliability): {wording.reliability(trusted)}.")
    beside = width >= _BESIDE and attribution.removals is None  # names of groups need the space
    shown = sorted(found.most_interesting[:_MOST_QUERIES])
    for query in shown:
        console.print()
        ranked = found.queries[query].ranked
        for start in range(0, len(ranked), _ABREAST):
            title = found.queries[query].name
            table = _table(attribution, title, ranked[start : start + _ABREAST], k, beside=beside)
            console.print(table, width=width)
        for each in ranked:
            say(each.verdict)
    console.print()
    fewer = f" Shown: the {len(shown)} of {len(found.queries)} queries with the most significant influences."
    fewer *= len(shown) < len(found.queries)
    say(
        f"{_NOT_SIGNIFICANT}: not significant among all {what}s (false discovery rate {100 * FDR:g} %). In brackets: "
        f"{100 * LEVEL:g} % intervals over seeds. Numbers of runs and retrainings give a power of {100 * POWER:g} %; "
        f"their ranges hold for all {what}s on {100 * PLANNING:g} % of queries.{fewer}",
        style="dim",
    )


def _table(attribution: Attribution, title: str, of_differences: Sequence[Ranked], k: int, beside: bool) -> Table:
    """Return one query's top removals by some differences, side by side.

    Intervals are beside the influences or, if that is too wide, beneath them.
    """
    separator = " " if beside else "\n"
    table = Table(
        title=escape(capital(title)),
        title_justify="left",
        box=SIMPLE_HEAD,
        show_edge=False,
        collapse_padding=True,
    )
    columns: list[list[str]] = []
    for ranked in of_differences:
        rows = ranked.rows[:k]
        exponent = common_exponent(end for row in rows for end in (row.influence, row.interval_low, row.interval_high))
        values = [_with_interval(row, exponent, separator) for row in rows]
        head = f"{ranked.words.short}\n{unit(exponent)}{' %' * ranked.difference.relative}".rstrip()
        labels = [_label(attribution, row) for row in rows]
        table.add_column(
            "example" if attribution.removals is None else "group (examples)",
            justify="right",
            min_width=min(max(map(len, labels)), _NAME) + 1,  # rich counts a padding that it collapses
        )
        table.add_column(escape(head), justify="right")
        table.add_column("", min_width=len(_NOT_SIGNIFICANT))
        columns.append([_shade(label, row.significant) for label, row in zip(labels, rows, strict=True)])
        columns.append([_shade(value, row.significant) for value, row in zip(values, rows, strict=True)])
        columns.append(["" if row.significant else _shade(_NOT_SIGNIFICANT, False) for row in rows])
    for cells in zip(*columns, strict=True):
        table.add_row(*cells)
    return table


def _with_interval(row: TopExample, exponent: int, separator: str) -> str:
    value, low, high = (number(part, exponent) for part in (row.influence, row.interval_low, row.interval_high))
    return escape(value if math.isnan(row.interval_low) else f"{value}{separator}[{low}, {high}]")


def _label(attribution: Attribution, row: TopExample) -> str:
    mark = wording.OUT_OF_RANGE if row.out_of_range else ""
    return mark + (row.name if attribution.removals is None else escape(f"{row.name} ({row.size})"))


def _shade(text: str, significant: bool) -> str:
    return text if significant else f"[dim]{text}[/]"
