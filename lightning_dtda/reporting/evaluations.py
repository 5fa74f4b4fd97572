"""How well attributions predict retraining, as a table in a hundred columns."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lightning_dtda.evaluation.comparing import Comparison, compare
from lightning_dtda.evaluation.evaluating import Evaluation, Score
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
    """Print the scores of attributions that were compared with one ground truth, and how far they are apart.

    Args:
        evaluations: By what the attributions are called; at least one. Of several, the others are compared with the
            first.
        console: Where to print; the standard output if not given.
    """
    console = console or Console()
    width = min(console.width, _COLUMNS)
    say = partial(console.print, width=width, highlight=False)
    separator = " " if width >= _COLUMNS else "\n"
    first = next(iter(evaluations.values()))
    say("[bold]Do predictions order removals as retraining does?[/]")
    say(
        f"Linear datamodeling score: rank correlation over {counted(first.subsets, 'subset')} of removed examples, "
        f"mean of {counted(first.queries, 'query', 'queries')}, of the {escape(first.measurement)}. Truth: "
        f"{counted(first.seeds, 'training')} without each subset, {first.baseline_seeds} on everything. "
        f"{_REMOVAL.get(first.removal, escape(first.removal))}"
    )
    say()
    say(_table(evaluations, separator))
    say()
    if len(evaluations) > 1:
        say(_comparisons(evaluations, separator))
        say()
    for note in _notes(evaluations):
        say(escape(note), style="dim")


def _table(evaluations: Mapping[str, Evaluation], separator: str) -> Table:
    """Return the table; intervals stand beside scores or, where that is too wide, beneath them."""
    differences = list(dict.fromkeys(name for each in evaluations.values() for name in each.scores))
    table = Table(box=SIMPLE_HEAD, show_edge=False)
    table.add_column("attribution", overflow="fold", min_width=len(_CEILING))
    table.add_column("runs", justify="right")
    for name in differences:
        table.add_column(escape(name), justify="right", no_wrap=True)
    for path, evaluation in evaluations.items():
        cells = [_cell(evaluation.scores.get(name), separator) for name in differences]
        table.add_row(escape(path), str(evaluation.runs), *cells)
    table.add_section()
    ceilings = [
        next((each.scores[name].ceiling for each in evaluations.values() if name in each.scores), None)
        for name in differences
    ]
    table.add_row(_CEILING, "", *(_UNKNOWN if ceiling is None else f"{ceiling:.3f}" for ceiling in ceilings))
    return table


def _comparisons(evaluations: Mapping[str, Evaluation], separator: str) -> Table:
    """Return the table of how much higher the others score than the first; dim where it may be none."""
    (name, first), *others = evaluations.items()
    table = Table(box=SIMPLE_HEAD, show_edge=False)
    table.add_column(f"score less that of {escape(name)}", overflow="fold", min_width=len(_CEILING))
    for difference in first.scores:
        table.add_column(escape(difference), justify="right", no_wrap=True)
    for path, evaluation in others:
        apart = compare(evaluation, first)
        cells = [_apart(apart.get(difference), separator) for difference in first.scores]
        table.add_row(escape(path), *cells)
    return table


def _cell(score: Score | None, separator: str) -> str:
    return _UNKNOWN if score is None else _with_interval(score.score, score.low, score.high, separator)


def _apart(apart: Comparison | None, separator: str) -> str:
    if apart is None:
        return _UNKNOWN
    text = _with_interval(apart.gain, apart.low, apart.high, separator, sign="+")
    return text if apart.clear else f"[dim]{text}[/]"


def _with_interval(value: float, low: float, high: float, separator: str, sign: str = "") -> str:
    ends = ", ".join(_rounded(limit, 2, sign) for limit in (low, high))
    return escape(f"{_rounded(value, 3, sign)}{separator}[{ends}]")


def _rounded(value: float, decimals: int, sign: str = "") -> str:
    text = f"{value:{sign}.{decimals}f}"
    return text.replace("-", MINUS) if float(text) else text.lstrip("+-")


def _notes(evaluations: Mapping[str, Evaluation]) -> list[str]:
    scores = [score for each in evaluations.values() for score in each.scores.values()]
    first = next(iter(evaluations.values()))
    notes = [
        f"In brackets: the {first.confidence:.0%} interval over queries, subsets, runs and seeds (bootstrap).",
        "Ceiling: what the true influences would score, since the truth is noisy; from halves of its seeds.",
    ]
    if len(evaluations) > 1:
        notes.insert(
            1,
            "Less the first: intervals of the difference itself, drawn together, since a truth's luck is shared. Dim: "
            "it may be none.",
        )
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
