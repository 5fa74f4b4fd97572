"""The results of an attribution, as text up to 100 characters wide."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lightning_dtda.attribution.attribution import Attribution
from lightning_dtda.reporting import wording
from lightning_dtda.reporting.certainty import FDR, LEVEL, PLANNING, POWER
from lightning_dtda.reporting.facts import most_interesting, without_repeated_warnings
from lightning_dtda.reporting.formatting import common_exponent, escape, number, unit
from lightning_dtda.reporting.rows import TopExample, significance_on, top_examples
from lightning_dtda.reporting.verdicts import retraining_verdict, verdict
from lightning_dtda.reporting.wording import describe
from lightning_dtda.statistics.differences import DIFFERENCES, Difference, resolve_difference

MOST_QUERIES = 3
"""Maximum number of queries in a summary: what fits one screen. The report shows more."""

_COLUMNS = 100

_ABREAST = 2
"""Number of differences side by side; more of them make more tables."""

_NAME = 24
"""Width up to which the name of a group is not wrapped."""

_NOT_SIGNIFICANT = "n.s."


def print_summary(
    attribution: Attribution,
    k: int = 5,
    differences: Sequence[str | Difference] | None = None,
    *,
    console: Console | None = None,
) -> None:
    """Print the question, how reliable the answer is, and the top examples, or groups, of a few queries.

    If there are more than :data:`MOST_QUERIES` queries, it prints those on which a single removal changes the spread
    most.

    Args:
        attribution: The attribution.
        k: Number of examples, or groups, for each query.
        differences: As for :meth:`Attribution.influence <lightning_dtda.Attribution.influence>`. ``None`` means mean
            and spread.
        console: Console to print to. Defaults to standard output.

    Raises:
        AttributionError: If ``k`` is less than one, a difference is unknown, or it needs more runs.
    """
    console = console or Console()
    width = min(console.width, _COLUMNS)
    say = partial(console.print, width=width, highlight=False)
    say(f"[bold]{escape(wording.question(attribution))}[/]")
    say(escape(wording.answer(attribution)))
    say(f"Largest relative replay drift of a run: {wording.drift(attribution)}.")
    cautions = wording.cautions(attribution)
    attribution = attribution.trusted()
    default = [DIFFERENCES[name] for name in attribution.available_differences]
    chosen = [resolve_difference(each) for each in differences or []] or [each for each in default if each.signed]
    say(f"Largest relative error of responses on a sample of steps: {wording.diagnosis(attribution)}.")
    with without_repeated_warnings():
        agreement = wording.reliability(attribution)
        say(f"Agreement between runs on the mean influence (split-half reliability): {agreement}.")
        for caution in cautions:
            say(f"[yellow]Caution.[/] {escape(caution)}")
        shown = most_interesting(attribution, MOST_QUERIES)
        beside = width >= _COLUMNS and attribution.removals is None  # names of groups need the space
        for query in shown:
            console.print()
            tests = [significance_on(attribution, query, difference) for difference in chosen]
            tops = [top_examples(attribution, query, each.difference, k, each) for each in tests]
            for start in range(0, len(chosen), _ABREAST):
                part = slice(start, start + _ABREAST)
                table = _table(attribution, query, chosen[part], tops[part], beside=beside)
                console.print(table, width=width)
            for each, top in zip(tests, tops, strict=True):
                say(escape(f"{verdict(attribution, each.outcome)} {retraining_verdict(attribution, top)}".strip()))
    console.print()
    notes = (
        f"{_NOT_SIGNIFICANT}: not significant among all {wording.noun(attribution)}s (false discovery rate "
        f"{100 * FDR:g} %). In brackets: {100 * LEVEL:g} % intervals over seeds. Numbers of runs and "
        f"retrainings give a power of {100 * POWER:g} %; their ranges hold for all {wording.noun(attribution)}s on "
        f"{100 * PLANNING:g} % of queries."
    )
    if len(shown) < len(attribution.queries):
        what = "spread" if len(attribution.runs) > 1 else "mean"
        notes += f" Shown: the {len(shown)} of {len(attribution.queries)} queries with the largest {what} influence."
    say(notes, style="dim")


def _table(
    attribution: Attribution,
    query: int,
    differences: Sequence[Difference],
    tops: Sequence[Sequence[TopExample]],
    beside: bool,
) -> Table:
    """Return one query's top removals by some differences, side by side.

    Intervals are beside the influences or, if that is too wide, beneath them.
    """
    separator = " " if beside else "\n"
    table = Table(
        title=f"Query {attribution.queries[query]}",
        title_justify="left",
        box=SIMPLE_HEAD,
        show_edge=False,
        collapse_padding=True,
    )
    columns: list[list[str]] = []
    for difference, rows in zip(differences, tops, strict=True):
        exponent = common_exponent(end for row in rows for end in (row.influence, row.interval_low, row.interval_high))
        values = [_with_interval(row, exponent, separator) for row in rows]
        words = describe(difference, attribution.measurement, wording.noun(attribution))
        head = f"{words.short}\n{unit(exponent)}{' %' * difference.relative}".rstrip()
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
