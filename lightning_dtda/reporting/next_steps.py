"""What to do after an attribution, with the exact commands for this one."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_dtda.attribution.attribution import ENOUGH_RUNS, Attribution
from lightning_dtda.evaluation.self_checks import RELIABLE, kept_results
from lightning_dtda.reporting.commands import kept_command
from lightning_dtda.reporting.formatting import counts, two_digits
from lightning_dtda.reporting.wording import counted, noun

if TYPE_CHECKING:
    from lightning_dtda.reporting.findings import QueryFindings
    from lightning_dtda.reporting.rows import TopExample

_QUESTION = ("--config", "-c", "--measurement", "--queries", "--device", "--measurement_draws", "--measurement_seed")
"""Options of ``attribute`` that ``retrain`` and ``check`` have too, or their beginnings."""

_MOST_TRAININGS = 1000
"""Number of trainings above which verification is not suggested."""


@dataclass(frozen=True)
class NextStep:
    """Something to do now.

    Args:
        title: What it does.
        cost: What it costs.
        commands: Commands to copy, or calls in Python if the attribution was made by Python.
    """

    title: str
    cost: str
    commands: tuple[str, ...]


def next_steps(attribution: Attribution, queries: Sequence[QueryFindings], agreed: float) -> list[NextStep]:
    """Return what to do now: verify the clearest effect, remove examples, record more runs, check the derivatives.

    Args:
        attribution: The attribution, with all runs.
        queries: What was found on each query.
        agreed: Agreement of halves of the trusted runs on the mean influence, median over queries; NaN if unknown.
    """
    asked = _Asked(attribution, kept_command(attribution))
    steps = [_verify(asked, queries), _more_runs(asked, agreed), _suggest(asked), _check(asked)]
    return [step for step in steps if step is not None]


@dataclass(frozen=True)
class _Asked:
    """An attribution, and the arguments of the command that made it, if a command did."""

    attribution: Attribution
    arguments: list[str] | None

    @property
    def path(self) -> str:
        """The attribution's directory, as an argument."""
        return shlex.quote(str(self.attribution.path))

    @property
    def ensemble(self) -> str:
        """The ensemble's directory, as an argument."""
        return shlex.quote(str(self.values("--ensemble")[0]))

    def values(self, option: str) -> list[str]:
        """Return the values of an option."""
        arguments, found = self.arguments or [], []
        for number, argument in enumerate(arguments):
            if argument == option and number + 1 < len(arguments):
                found.append(arguments[number + 1])
            elif argument.startswith(f"{option}="):
                found.append(argument.partition("=")[2])
        return found

    def shared(self) -> list[str]:
        """Return the arguments that say what is measured, on which queries, of which ensemble."""
        chosen: list[str] = []
        taking = False
        for argument in self.arguments or []:
            if argument.startswith("-"):
                name = argument.partition("=")[0]
                taking = name == "--ensemble" or name.partition(".")[0] in _QUESTION
            if taking:
                chosen.append(argument)
        return chosen


def _verify(asked: _Asked, queries: Sequence[QueryFindings]) -> NextStep | None:
    """Return how to confirm the effect that needs the fewest retrainings."""
    rows = [
        (row.retrainings_high, row.retrainings_low, row)
        for query in queries
        for ranked in query.ranked
        for row in ranked.rows
        if row.significant and row.retrainings_low <= _MOST_TRAININGS
    ]
    if not rows:
        return None
    high, low, row = min(rows, key=lambda each: each[:2])
    seeds = math.ceil(math.sqrt(low * min(high, _MOST_TRAININGS)))  # the middle of the range, in proportion
    what = noun(asked.attribution)
    cost = (
        f"{counted(seeds, 'training')} without it and {seeds} with all data, {_times(asked, 2 * seeds)} "
        f"({counts(low, high)} may be needed to show the effect)."
    )
    return NextStep(f"Verify: retrain without {what} {row.name}", cost, _retraining(asked, row, seeds))


def _retraining(asked: _Asked, row: TopExample, seeds: int) -> tuple[str, ...]:
    members = asked.attribution.members
    subset = [row.position] if members is None else sorted(members[row.position])
    if asked.arguments is None or asked.attribution.path is None:
        measured = f'queries=queries, measurement="{asked.attribution.measurement}"'
        return (
            f"truth = retrain(module, data, subsets=[{subset}], seeds={seeds}, {measured})",
            'report(attribution, "verified.html", truth=truth)',
        )
    output = shlex.quote(f"{asked.attribution.path}-verified")
    return (
        shlex.join(["lightning-dtda", "retrain", *asked.shared(), f"--removed={json.dumps([subset])}"])
        + f" --seeds {seeds} --output {output}",
        f"lightning-dtda report --attribution {asked.path} --truth {output} --output verified.html",
    )


def _more_runs(asked: _Asked, agreed: float) -> NextStep | None:
    """Return how to record more runs, if there are too few."""
    runs = len(asked.attribution.runs)
    wanted = further_runs(agreed, runs)
    if not 1 <= wanted < math.inf:
        return None
    more = two_digits(wanted)
    cost = f"{counted(more, 'training')}, {_times(asked, more)}."
    title = f"Record {counted(more, 'more run')}, and attribute again"
    if asked.arguments is None:
        return NextStep(title, cost, (f"record(..., seeds={runs + more})", "attribute(...)  # the same call continues"))
    again = shlex.join(["lightning-dtda", "attribute", *asked.arguments])
    return NextStep(title, cost, (f"lightning-dtda record --ensemble {asked.ensemble} --seeds {runs + more}", again))


def _times(asked: _Asked, trainings: int) -> str:
    """Return how long trainings take, in proportion to the recording."""
    times = f"{trainings / len(asked.attribution.runs):.2g}"
    return "as long as the recording" if times == "1" else f"{times} times as long as the recording"


def further_runs(agreed: float, runs: int) -> float:
    """Return how many more runs would make the ranking reliable, by Spearman and Brown's formula.

    Example:
        >>> further_runs(0.2, 20), further_runs(0.8, 20), further_runs(math.nan, 3), further_runs(-0.1, 20)
        (60, 0, 5, inf)
    """
    if math.isnan(agreed):
        return max(ENOUGH_RUNS - runs, 1)
    if agreed <= 0:
        return math.inf
    times = RELIABLE / (1 - RELIABLE) * (1 - agreed) / agreed
    return max(0, math.ceil(round(runs * (times - 1), 6)))


def _suggest(asked: _Asked) -> NextStep:
    """Return how to find removals that make the training better, or more reproducible."""
    goal = "reduce_variance" if len(asked.attribution.trusted().runs) > 2 else "improve_mean"
    what = "less dependent on the seed" if goal == "reduce_variance" else "better"
    title = f"Remove: find {noun(asked.attribution)}s whose removal makes the result {what}"
    if asked.attribution.path is None:
        return NextStep(title, "No training.", (f'suggest_removals(attribution, goal="{goal}")',))
    command = f"lightning-dtda suggest --attribution {asked.path} --goal {goal}"
    return NextStep(title, "No training.", (command,))


def _check(asked: _Asked) -> NextStep | None:
    """Return how to check the responses against retraining, if that was not done."""
    if kept_results(asked.attribution):
        return None
    title, cost = "Check that the responses are derivatives of this training", "A few retrainings of the first run."
    path = asked.attribution.path
    if asked.arguments is not None and path is not None:
        command = shlex.join(["lightning-dtda", "check", *asked.shared()])
        return NextStep(title, cost, (f"{command} --attribution {asked.path}",))
    store = () if path is None else (f"found.save({str(path)!r})",)
    return NextStep(title, cost, ("found = check(ensemble, module, data, queries=queries)", *store))
