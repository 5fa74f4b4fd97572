"""``lightning-dtda suggest``: suggest examples to leave out."""

from __future__ import annotations

from collections.abc import Sequence

from jsonargparse import ArgumentParser
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lightning_dtda.attribution.attribution import Attribution
from lightning_dtda.attribution.suggesting import Suggestion, effect_text, suggest_removals
from lightning_dtda.cli.help import PlainHelp
from lightning_dtda.cli.question import option_value
from lightning_dtda.cli.retrain import retrained
from lightning_dtda.cli.weights_and_biases import add_wandb, logger_of, recorded_runs
from lightning_dtda.errors import AttributionError
from lightning_dtda.evaluation import Verification, verify
from lightning_dtda.evaluation.evaluating import check_alignment
from lightning_dtda.reporting.formatting import escape
from lightning_dtda.reporting.wording import counted
from lightning_dtda.retraining import GroundTruth


def run(arguments: Sequence[str]) -> None:
    """Suggest removals and print them; with ``--verify``, retrain without them and print the real change.

    Raises:
        SystemExit: With code 1 if trainings failed, 2 if an option is unknown or needs ``--verify``.
    """
    parser = ArgumentParser(
        prog="lightning-dtda suggest",
        description="Suggest examples whose joint removal serves a goal, or say that none does. With --verify, all "
        "other options are those of lightning-dtda retrain.",
        formatter_class=PlainHelp,
    )
    parser.add_argument("--attribution", type=str, required=True, help="Directory of the attribution.")
    settings = parser.add_function_arguments(
        suggest_removals, as_group=False, skip={"attribution", "queries", "level", "runs"}
    )
    parser.add_argument(
        "--queries", type=int | list[int] | None, default=None, help="Indices of the queries to use; all by default."
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="Retrain with and without the suggested examples: --ensemble (or --config), --output, --seeds ...",
    )
    add_wandb(parser)
    own, others = _split(arguments, ("attribution", "queries", "verify", "wandb", "h", "help", *settings))
    options = parser.parse_args(own)
    if others and not options.verify:
        parser.error(f"unrecognized: {' '.join(others)}. Options of retrain need --verify")
    attribution = Attribution.load(options.attribution).independent()
    queries = _positions(attribution, options.queries)
    suggestion = suggest_removals(attribution, queries=queries, **{name: options[name] for name in settings})
    print_suggestion(suggestion)
    verification = None
    if options.verify and suggestion.removed:
        verification = verify(suggestion, _retrained(attribution, suggestion, others))
        print_verification(suggestion, verification)
    if options.wandb:
        from lightning_dtda.reporting import log_suggestion_to_wandb

        truth = option_value(others, "--output") if verification is not None else None
        where = logger_of(recorded_runs(attribution))
        log_suggestion_to_wandb(suggestion, attribution, verification=verification, truth=truth, **where)


def _positions(attribution: Attribution, indices: int | list[int] | None) -> list[int] | None:
    """Return the positions of queries that are given by their indices in the data set.

    Raises:
        AttributionError: If the attribution has no such query.
    """
    if indices is None:
        return None
    positions = {index: position for position, index in enumerate(attribution.queries)}
    chosen = [indices] if isinstance(indices, int) else indices
    if unknown := [index for index in chosen if index not in positions]:
        known = ", ".join(map(str, attribution.queries))
        raise AttributionError(f"--queries has {unknown[0]}; the queries of the attribution are {known}.")
    return [positions[index] for index in chosen]


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
    real = effect_text(suggestion.goal, found.effect, found.low, found.high)
    Console(highlight=False).print(
        f"Retrained {found.seeds} times without the {len(suggestion.removed)} examples and {found.baseline_seeds} "
        f"times with them. The {escape(suggestion.quantity)} was {found.before:.3g} and changed by {escape(real)}, "
        f"{found.level:.0%} interval; the prediction was {escape(suggestion.effect(suggestion.best))}."
    )


def print_suggestion(suggestion: Suggestion) -> None:
    """Print the verdict, and the removals in order, each with the effect of all removals up to it."""
    console = Console(highlight=False)
    console.print(f"[bold]{escape(suggestion.verdict)}[/]")
    if not suggestion.removals:
        console.print("More runs, or a lower --caution, may find some.")
        return
    runs = f"{len(suggestion.evaluated_on)} runs " + (
        "not used for the choice" if suggestion.held_out else "also used for the choice, so the effects are optimistic"
    )
    queries = counted(len(suggestion.queries), "query", "queries")
    console.print(
        f"Change of the {escape(suggestion.quantity)}, over {queries}. As trained, it is "
        f"{suggestion.before:.3g}. Evaluated on {runs}. The {suggestion.level:.0%} intervals hold together, for all "
        "numbers of removals."
    )
    table = Table(box=SIMPLE_HEAD, show_edge=False)
    for head in ("remove", "examples so far", f"predicted change [{suggestion.level:.0%} interval]"):
        table.add_column(escape(head), justify="right")
    table.add_column("")
    for step, (removal, together) in enumerate(zip(suggestion.removals, suggestion.sets, strict=True), start=1):
        mark, style = ("best", "bold") if step == suggestion.best else ("", "" if step < suggestion.best else "dim")
        table.add_row(escape(str(removal)), str(len(together)), escape(suggestion.effect(step)), mark, style=style)
    console.print(table)
    if suggestion.best:
        console.print("These are predictions: retrain without the examples before you rely on them.", style="dim")
