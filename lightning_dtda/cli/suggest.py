"""``lightning-dtda suggest``: which examples to leave out."""

from __future__ import annotations

from collections.abc import Sequence

from jsonargparse import ArgumentParser
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lightning_dtda.attribution.attribution import Attribution
from lightning_dtda.attribution.suggesting import GoalName, Suggestion, suggest_removals
from lightning_dtda.reporting.formatting import common_exponent, number, unit


def run(arguments: Sequence[str]) -> None:
    """Suggest removals and print them."""
    parser = ArgumentParser(
        prog="lightning-dtda suggest", description="Suggest examples whose removal together serves a goal."
    )
    parser.add_argument("--attribution", type=str, required=True, help="Directory of the attribution.")
    parser.add_argument("--goal", type=GoalName, default="reduce_variance", help="What is to become better.")
    parser.add_argument("--k", type=int, default=10, help="The most removals.")
    parser.add_argument(
        "--queries", type=list[int] | None, default=None, help="Positions of queries; all if not given."
    )
    parser.add_argument("--lower_is_better", type=bool, default=True, help="Of the measurement, for improve_mean.")
    parser.add_argument("--held_out", type=float, default=0.5, help="Share of the runs that effects are taken from.")
    parser.add_argument("--caution", type=float, default=1.0, help="Standard errors by which a gain is lowered.")
    options = parser.parse_args(list(arguments))
    print_suggestion(
        suggest_removals(
            Attribution.load(options.attribution),
            options.goal,
            options.k,
            options.queries,
            lower_is_better=options.lower_is_better,
            held_out=options.held_out,
            caution=options.caution,
        )
    )


def print_suggestion(suggestion: Suggestion) -> None:
    """Print the removals in order, each with the effect of the set that it completes."""
    console = Console(highlight=False)
    if not suggestion.removals:
        console.print(
            f"No removal is predicted to change the {escape(suggestion.quantity)} for the better, by more than its "
            "uncertainty over runs. More runs, or less caution, may find some."
        )
        return
    ends = suggestion.intervals.flatten().tolist()
    exponent = common_exponent([suggestion.before, *suggestion.effects.tolist(), *ends])
    runs = f"{len(suggestion.evaluated_on)} runs " + (
        "that had no say in the choice" if suggestion.held_out else "that the choice was made with: it is too good"
    )
    table = Table(box=SIMPLE_HEAD, show_edge=False)
    table.add_column("remove", justify="right")
    table.add_column("examples so far", justify="right")
    table.add_column(f"predicted change {unit(exponent)}".strip(), justify="right")
    table.add_column(f"{suggestion.level:.0%} interval", justify="right")
    for row in suggestion.to_dataframe().itertuples():
        interval = f"{number(row.lower, exponent)} to {number(row.upper, exponent)}"
        table.add_row(escape(str(row.removal)), str(row.examples), number(row.effect, exponent), interval)
    before = f"{number(suggestion.before, exponent)} {unit(exponent)}".rstrip()
    console.print(
        f"Change of the {escape(suggestion.quantity)}, averaged over {len(suggestion.queries)} queries. As trained it "
        f"is {before}. On {runs}."
    )
    console.print(table)
    console.print("These are predictions: retrain without the examples before you rely on them.", style="dim")
