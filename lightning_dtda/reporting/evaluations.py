"""How well attributions predict retraining, as a table up to 100 characters wide."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lightning_dtda.evaluation.comparing import Comparison, compare
from lightning_dtda.evaluation.evaluating import Evaluation, Score
from lightning_dtda.reporting.formatting import MINUS, escape
from lightning_dtda.reporting.wording import counted

_COLUMNS = 100
_CEILING = "noise ceiling"
_UNKNOWN = "\N{EN DASH}"

_REMOVAL = {
    "drop": "Retraining dropped the examples from the data (drop); predictions give them weight zero (reweight).",
    "reweight": "Retraining gave the examples weight zero in the recorded runs (reweight), as the predictions do.",
}


def print_evaluations(evaluations: Mapping[str, Evaluation], console: Console | None = None) -> None:
    """Print the scores of attributions that were compared with one ground truth, and the differences between them.

    Args:
        evaluations: Evaluations by the name of the attribution; at least one. The others are compared with the first.
        console: Console to print to. Defaults to standard output.
    """
    console = console or Console()
    width = min(console.width, _COLUMNS)
    say = partial(console.print, width=width, highlight=False)
    separator = " " if width >= _COLUMNS else "\n"
    first = next(iter(evaluations.values()))
    say("[bold]Do predictions rank removals as retraining does?[/]")
    say(
        f"Linear datamodeling score for the {escape(first.measurement)}: rank correlation over "
        f"{counted(first.subsets, 'subset')} of removed examples, mean over "
        f"{counted(first.queries, 'query', 'queries')}. Ground truth: {counted(first.seeds, 'training')} without each "
        f"subset, {first.baseline_seeds} with all data. "
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
    """Return the table, with intervals beside the scores or, if that is too wide, beneath them."""
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
    """Return the table of how much higher the others score than the first, dim where the interval includes zero."""
    (name, first), *others = evaluations.items()
    table = Table(box=SIMPLE_HEAD, show_edge=False)
    table.add_column(f"score minus that of {escape(name)}", overflow="fold", min_width=len(_CEILING))
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
        f"In brackets: {first.confidence:.0%} intervals over queries, subsets, runs and seeds (bootstrap).",
        "Noise ceiling: what exact influences would score, as the ground truth is noisy; from halves of its seeds.",
    ]
    if len(evaluations) > 1:
        notes.insert(
            1,
            "Differences: both scores are bootstrapped together, as they share the ground truth's noise. Dim: the "
            "interval includes zero.",
        )
    if any(score.ceiling is None for score in scores):
        notes.append("Too few seeds for a noise ceiling: it needs 4 trainings without each subset and 4 with all data.")
    if constant := max(score.constant_queries for score in scores):
        queries = counted(constant, "query", "queries")
        notes.append(f"Up to {queries} left out: the ground truth is the same for all subsets.")
    if constant := max(score.constant_predictions for score in scores):
        notes.append(f"Up to {counted(constant, 'query scores', 'queries score')} 0: all predictions are the same.")
    for path, evaluation in evaluations.items():
        if evaluation.left_out:
            notes.append(f"{path}: {counted(len(evaluation.left_out), 'chaotic run')} left out.")
        if evaluation.shared_seeds:
            notes.append(
                f"{path}: {counted(len(evaluation.shared_seeds), 'seed')} both recorded and retrained, so predictions "
                "and ground truth share noise."
            )
    return notes
