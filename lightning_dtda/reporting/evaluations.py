"""How well attributions predict retraining, as a table in a hundred columns."""

from __future__ import annotations

from collections.abc import Mapping

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lightning_dtda.metrics.evaluating import Evaluation, Score
from lightning_dtda.reporting.formatting import MINUS
from lightning_dtda.reporting.wording import counted

_COLUMNS = 100
_CEILING = "noise ceiling"
_UNKNOWN = "\N{EN DASH}"

_REMOVAL = {
    "drop": "The examples were gone (drop); predictions are of weight zero (reweight), with order and divisor kept.",
    "reweight": "The examples had weight zero in the recorded runs (reweight), as predictions have it.",
}


def print_evaluations(evaluations: Mapping[str, Evaluation], console: Console | None = None) -> None:
    """Print the scores of attributions that were compared with one ground truth.

    Args:
        evaluations: By what the attributions are called; at least one.
        console: Where to print; the standard output if not given.
    """
    console = console or Console()
    width = min(console.width, _COLUMNS)
    first = next(iter(evaluations.values()))
    console.print("[bold]Do predictions order removals as retraining does?[/]", width=width, highlight=False)
    console.print(
        f"Linear datamodeling score: rank correlation over {counted(first.subsets, 'subset')} of removed examples, "
        f"mean of {counted(first.queries, 'query', 'queries')}, of the {escape(first.measurement)}. Truth: "
        f"{counted(first.seeds, 'training')} without each subset, {first.baseline_seeds} on everything. "
        f"{_REMOVAL.get(first.removal, escape(first.removal))}",
        width=width,
        highlight=False,
    )
    console.print()
    console.print(_table(evaluations, beside=width >= _COLUMNS), width=width)
    console.print()
    for note in _notes(evaluations):
        console.print(escape(note), style="dim", width=width, highlight=False)


def _table(evaluations: Mapping[str, Evaluation], beside: bool) -> Table:
    """Return the table; intervals stand beside scores or, where that is too wide, beneath them."""
    differences = list(dict.fromkeys(name for each in evaluations.values() for name in each.scores))
    table = Table(box=SIMPLE_HEAD, show_edge=False)
    table.add_column("attribution", overflow="fold", min_width=len(_CEILING))
    table.add_column("runs", justify="right")
    for name in differences:
        table.add_column(escape(name), justify="right", no_wrap=True)
    for path, evaluation in evaluations.items():
        cells = [_cell(evaluation.scores.get(name), " " if beside else "\n") for name in differences]
        table.add_row(escape(path), str(evaluation.runs), *cells)
    table.add_section()
    ceilings = [
        next((each.scores[name].ceiling for each in evaluations.values() if name in each.scores), None)
        for name in differences
    ]
    table.add_row(_CEILING, "", *(_UNKNOWN if ceiling is None else f"{ceiling:.3f}" for ceiling in ceilings))
    return table


def _cell(score: Score | None, separator: str) -> str:
    if score is None:
        return _UNKNOWN
    low, high = (_rounded(limit, 2) for limit in (score.low, score.high))
    return escape(f"{_rounded(score.score, 3)}{separator}[{low}, {high}]")


def _rounded(value: float, decimals: int) -> str:
    text = f"{value:.{decimals}f}"
    return text.replace("-", MINUS) if float(text) else text.lstrip("-")


def _notes(evaluations: Mapping[str, Evaluation]) -> list[str]:
    scores = [score for each in evaluations.values() for score in each.scores.values()]
    first = next(iter(evaluations.values()))
    notes = [
        f"In brackets: the {first.confidence:.0%} interval over queries, subsets, runs and seeds (bootstrap).",
        "Ceiling: what the true influences would score, since the truth is noisy; from halves of its seeds.",
    ]
    if any(score.ceiling is None for score in scores):
        notes.append("There are too few seeds for a ceiling: 4 trainings without each subset and 4 on everything.")
    if constant := max(score.constant_queries for score in scores):
        notes.append(f"Up to {counted(constant, 'query', 'queries')} left out: the truth is the same for all subsets.")
    if constant := max(score.constant_predictions for score in scores):
        notes.append(f"Up to {counted(constant, 'query counts', 'queries count')} as 0: all predictions are the same.")
    for path, evaluation in evaluations.items():
        if evaluation.left_out:
            notes.append(f"{path}: {counted(len(evaluation.left_out), 'chaotic run')} left out.")
        if evaluation.shared_seeds:
            notes.append(
                f"{path}: {counted(len(evaluation.shared_seeds), 'seed')} both recorded and retrained; truth and "
                "prediction share noise."
            )
    return notes
