"""``lightning-dtda suggest``: suggest examples to leave out."""

from __future__ import annotations

from collections.abc import Sequence

from jsonargparse import ArgumentParser
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lightning_dtda.attribution.attribution import Attribution
from lightning_dtda.attribution.suggesting import Suggestion, suggest_removals
from lightning_dtda.cli.help import PlainHelp
from lightning_dtda.cli.retrain import retrained
from lightning_dtda.evaluation import Verification, verify
from lightning_dtda.evaluation.evaluating import check_alignment
from lightning_dtda.reporting.formatting import common_exponent, escape, number, unit
from lightning_dtda.retraining import GroundTruth


def run(arguments: Sequence[str]) -> None:
    """Suggest removals and print them; with ``--verify``, retrain without them and print the real change.

    Raises:
        SystemExit: With code 1 if trainings failed, 2 if an option is unknown or needs ``--verify``.
    """
    parser = ArgumentParser(
        prog="lightning-dtda suggest",
        description="Suggest examples whose joint removal serves a goal. With --verify, all other options are those of "
        "lightning-dtda retrain.",
        formatter_class=PlainHelp,
    )
    parser.add_argument("--attribution", type=str, required=True, help="Directory of the attribution.")
    settings = parser.add_function_arguments(suggest_removals, as_group=False, skip={"attribution", "level", "runs"})
    parser.add_argument(
        "--verify",
        action="store_true",
        help="Retrain with and without the suggested examples: --ensemble (or --config), --output, --seeds ...",
    )
    own, others = _split(arguments, ("attribution", "verify", "h", "help", *settings))
    options = parser.parse_args(own)
    if others and not options.verify:
        parser.error(f"unrecognized: {' '.join(others)}. Options of retrain need --verify")
    attribution = Attribution.load(options.attribution)
    suggestion = suggest_removals(attribution, **{name: options[name] for name in settings})
    print_suggestion(suggestion)
    if options.verify and suggestion.removals:
        print_verification(suggestion, verify(suggestion, _retrained(attribution, suggestion, others)))


def _split(arguments: Sequence[str], options: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split arguments into this command's own options and those for retrain."""
    own: list[str] = []
    others: list[str] = []
    into = own
    for argument in arguments:
        if argument.startswith("-"):
            into = own if argument.split("=")[0].lstrip("-") in options else others
        into.append(argument)
    return own, others


def _retrained(attribution: Attribution, suggestion: Suggestion, arguments: Sequence[str]) -> GroundTruth:
    """Retrain without the suggested examples, and measure the attribution's queries."""
    question = {"queries.indices": list(attribution.queries), "measurement": attribution.measurement}
    truth = retrained(arguments, [sorted(suggestion.removed)], question)
    check_alignment(attribution, truth)
    return truth


def print_verification(suggestion: Suggestion, found: Verification) -> None:
    """Print the change found by retraining next to the predicted change."""
    predicted = [float(each) for each in (suggestion.effects[-1], *suggestion.intervals[:, -1])]
    exponent = common_exponent([found.before, found.effect, found.low, found.high, *predicted])

    def interval(effect: float, low: float, high: float) -> str:
        ends = f"{number(low, exponent)} to {number(high, exponent)}"
        return f"{number(effect, exponent)} ({ends}) {unit(exponent)}".rstrip()

    before = f"{number(found.before, exponent)} {unit(exponent)}".rstrip()
    Console(highlight=False).print(
        f"Retrained {found.seeds} times without the {len(suggestion.removed)} examples and {found.baseline_seeds} "
        f"times with them. The {escape(suggestion.quantity)} was {before} and changed by "
        f"{interval(found.effect, found.low, found.high)}, {found.level:.0%} interval; the prediction was "
        f"{interval(*predicted)}."
    )


def print_suggestion(suggestion: Suggestion) -> None:
    """Print the removals in order, each with the effect of all removals up to it."""
    console = Console(highlight=False)
    if not suggestion.removals:
        console.print(
            f"No removal is predicted to improve the {escape(suggestion.quantity)} by more than its uncertainty over "
            "runs. More runs, or a lower --caution, may find some."
        )
        return
    ends = suggestion.intervals.flatten().tolist()
    exponent = common_exponent([suggestion.before, *suggestion.effects.tolist(), *ends])
    runs = f"{len(suggestion.evaluated_on)} runs " + (
        "not used for the choice" if suggestion.held_out else "also used for the choice, so the effects are optimistic"
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
        f"Change of the {escape(suggestion.quantity)}, averaged over {len(suggestion.queries)} queries. As trained, it "
        f"is {before}. Evaluated on {runs}."
    )
    console.print(table)
    console.print("These are predictions: retrain without the examples before you rely on them.", style="dim")
