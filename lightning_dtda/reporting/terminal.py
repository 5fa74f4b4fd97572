"""What an attribution found, in a hundred columns."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lightning_dtda.attribution.attribution import Attribution
from lightning_dtda.reporting import wording
from lightning_dtda.reporting.findings import (
    CLEAR,
    TopExample,
    most_interesting,
    top_examples,
    without_repeated_warnings,
)
from lightning_dtda.reporting.formatting import common_exponent, number, unit

MOST_QUERIES = 3
"""Queries in a summary: what fits one screen. The report shows more."""

_COLUMNS = 100

_HEADS = {
    "mean": "change of the mean {} if removed",
    "variance": "change of the {}'s variance if removed",
}


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
    console.print(f"[bold]{escape(wording.question(attribution))}[/]", width=width, highlight=False)
    console.print(escape(wording.answer(attribution)), width=width, highlight=False)
    console.print(
        f"Largest replay drift of a run: {wording.drift(attribution)} (relative).", width=width, highlight=False
    )
    cautions = wording.cautions(attribution)
    attribution = attribution.trusted()
    console.print(
        f"Largest error of responses, on a sample of steps: {wording.diagnosis(attribution)} (relative).",
        width=width,
        highlight=False,
    )
    with without_repeated_warnings():
        console.print(
            f"Agreement of the runs about the mean influence (split-half reliability): "
            f"{wording.reliability(attribution)}.",
            width=width,
            highlight=False,
        )
        for caution in cautions:
            console.print(f"[yellow]Caution.[/] {escape(caution)}", width=width, highlight=False)
        shown = most_interesting(attribution, MOST_QUERIES)
        for query in shown:
            console.print()
            console.print(_table(attribution, query, k), width=width)
    console.print()
    notes = f"Dim, with a dot: not more than {CLEAR:g} standard errors (jackknife over runs) from zero."
    if len(shown) < len(attribution.queries):
        notes += f" {len(shown)} of {len(attribution.queries)} queries, those with the largest variance influence."
    console.print(notes, style="dim", width=width, highlight=False)


def _table(attribution: Attribution, query: int, k: int) -> Table:
    """Return one query's top removals, by mean and by variance side by side."""
    table = Table(title=f"Query {attribution.queries[query]}", title_justify="left", box=SIMPLE_HEAD, show_edge=False)
    columns: list[list[str]] = []
    for difference in attribution.available_differences:
        if difference == "wasserstein":  # mean and variance say which way; three do not fit the columns
            continue
        top = top_examples(attribution, query, difference, k)
        # as a change by removal both, which is what one asks at a terminal; the mean influence is its negative
        changes = [row.mean_shift if difference == "mean" else row.variance_change for row in top]
        exponent = common_exponent(changes)
        table.add_column("example" if attribution.removals is None else "group (examples)", justify="right")
        table.add_column(
            escape(f"{_HEADS[difference].format(attribution.measurement)} ± standard error {unit(exponent)}"),
            justify="right",
        )
        columns.append([_shade(_label(attribution, row), row.clear) for row in top])
        columns.append(
            [
                _shade(f"{number(change, exponent)} ± {number(row.standard_error, exponent)}", row.clear)
                for change, row in zip(changes, top, strict=True)
            ]
        )
    for cells in zip(*columns, strict=True):
        table.add_row(*cells)
    return table


def _label(attribution: Attribution, row: TopExample) -> str:
    return row.name if attribution.removals is None else escape(f"{row.name} ({row.size})")


def _shade(text: str, clear: bool) -> str:
    return text if clear else f"[dim]·{text}[/]"
