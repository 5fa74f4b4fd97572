"""What to do after an attribution, with the exact commands for this one."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_dtda.attribution.attribution import ENOUGH_RUNS, Attribution
from lightning_dtda.attribution.kept import KeptResponses
from lightning_dtda.evaluation.self_checks import RELIABLE, kept_results, unrolled
from lightning_dtda.replay.measurements import MEASUREMENTS
from lightning_dtda.reporting.commands import Command, kept_command
from lightning_dtda.reporting.formatting import counts, two_digits
from lightning_dtda.reporting.wording import counted, noun

if TYPE_CHECKING:
    from lightning_dtda.reporting.findings import QueryFindings
    from lightning_dtda.reporting.rows import TopExample

_CONFIGURATION = ("--config", "-c", "--model", "--data", "--trainer", "--optimizer", "--lr_scheduler")
_QUESTION = (*_CONFIGURATION, "--measurement", "--queries", "--device")
_DRAWS = ("--measurement_draws", "--measurement_seed")
"""Options of ``attribute`` that other commands have, too."""

_MOST_TRAININGS = 1000
"""Number of trainings above which neither verification nor more runs are suggested."""

_MOST_REMOVED = 1000
"""Number of examples above which a group is too long for a command."""

_TOP = 5
"""Number of top removals of each query among which one is chosen to be verified: the same for every report."""

_CHECKED_QUERIES = 5
"""Number of queries that ``check`` takes by default."""

_FEWEST_TO_SUGGEST = 6
"""Number of runs from which ``suggest`` has enough to choose by and to evaluate."""


@dataclass(frozen=True)
class NextStep:
    """Something to do now.

    Args:
        title: What it does.
        cost: What it costs.
        commands: Commands to copy, or calls in Python if the attribution was made by Python. Paths are relative to the
            directory in which the attribution was made.
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
    command = kept_command(attribution)
    steps = [
        _verify(attribution, command, queries),
        _more_runs(attribution, command, agreed),
        _suggest(attribution),
        _check(attribution, command),
    ]
    return [step for step in steps if step is not None]


def _quoted(attribution: Attribution) -> str:
    return shlex.quote(str(attribution.path))


def _verify(attribution: Attribution, command: Command | None, queries: Sequence[QueryFindings]) -> NextStep | None:
    """Return how to confirm the effect on a mean or spread that needs the fewest retrainings."""
    members = attribution.members
    if attribution.step is not None or isinstance(attribution.responses, KeptResponses):
        return None  # such predictions cannot be compared with retraining
    rows = [
        (row.retrainings_high, row.retrainings_low, row)
        for query in queries
        for ranked in query.ranked
        for row in ranked.rows[:_TOP]
        if ranked.difference.name in ("mean", "spread")
        and row.significant
        and row.retrainings_low <= _MOST_TRAININGS
        and (members is None or len(members[row.position]) <= _MOST_REMOVED)
    ]
    if not rows:
        return None
    high, low, row = min(rows, key=lambda each: each[:2])
    seeds = math.ceil(math.sqrt(low * min(high, _MOST_TRAININGS)))  # the middle of the range, in proportion
    cost = (
        f"{counted(seeds, 'training')} without it and {seeds} with all data, {_times(attribution, 2 * seeds)} "
        f"({counts(low, high)} may be needed to show the effect)."
    )
    title = f"Verify: retrain without {noun(attribution)} {row.name}"
    return NextStep(title, cost, _retraining(attribution, command, row, seeds))


def _retraining(attribution: Attribution, command: Command | None, row: TopExample, seeds: int) -> tuple[str, ...]:
    members = attribution.members
    subset = [row.position] if members is None else sorted(members[row.position])
    if command is None or attribution.path is None:
        draws = attribution.about.get("draws") or {}
        drawn = "".join(f", measurement_{'draws' if key == 'number' else key}={draws[key]}" for key in draws)
        return (
            f"truth = retrain(module, data, subsets=[{subset}], seeds={seeds}, queries=queries"
            f"{_measured(attribution)}{drawn}, trainer=make_trainer)",
            'report(attribution, "verified.html", truth=truth)',
        )
    output = f"{attribution.path}-verified"
    retrain = ["retrain", "--ensemble", command.ensemble, *command.given((*_QUESTION, *_DRAWS))]
    retrain += [f"--removed={json.dumps([subset])}", "--seeds", str(seeds), "--output", output]
    report = ["report", "--attribution", str(attribution.path), "--truth", output, "--output", "verified.html"]
    return tuple(shlex.join(["lightning-dtda", *each]) for each in (retrain, report))


def _measured(attribution: Attribution) -> str:
    """Return the argument for the measurement, if it is not the default."""
    name = attribution.measurement
    return "" if name == "loss" else f', measurement="{name}"' if name in MEASUREMENTS else ", measurement=measurement"


def _more_runs(attribution: Attribution, command: Command | None, agreed: float) -> NextStep | None:
    """Return how to record more runs, if there are too few."""
    wanted = further_runs(agreed, len(attribution.trusted().runs))
    if not 1 <= wanted <= _MOST_TRAININGS:
        return None
    more = two_digits(wanted)
    crossed = attribution.about.get("seeds")
    chosen = _seeds(attribution, more) if not crossed else _crossed_seeds(crossed, more)
    trainings = more if not isinstance(chosen, dict) else math.prod(map(_number, chosen.values())) - len(crossed or ())
    if trainings > _MOST_TRAININGS:
        return None
    cost = f"{counted(trainings, 'training')}, {_times(attribution, trainings)}."
    title = f"Record {counted(trainings, 'more run')}, and attribute again"
    if command is None:
        given = f"CrossedSeeds({_arguments(chosen)})" if isinstance(chosen, dict) else chosen
        return NextStep(title, cost, (f"record(..., seeds={given})", "attribute(...)  # the same call continues"))
    configuration = command.given(_CONFIGURATION)
    if not any(each.startswith(("--config", "-c")) for each in configuration):
        configuration = ["--config", f"{command.ensemble}/config.yaml", *configuration]
    options = chosen if isinstance(chosen, dict) else {"": chosen}
    seeds = [f"--seeds{'.' * bool(source)}{source}={of_source}" for source, of_source in options.items()]
    record = ["record", *configuration, "--ensemble", command.ensemble, *seeds]
    again = ["attribute", *command.arguments]
    if isinstance(attribution.responses, KeptResponses) and "--overwrite" not in again:
        again.append("--overwrite")  # of kept responses, no part can be added
    return NextStep(title, cost, tuple(shlex.join(["lightning-dtda", *each]) for each in (record, again)))


def _seeds(attribution: Attribution, more: int) -> int | list[int]:
    """Return all seeds to record: a number if they are the first ones, else a list with new ones at its end."""
    found = [re.fullmatch(r"seed-(\d+)", run) for run in attribution.runs]
    return _extended([int(match[1]) for match in found if match is not None], more)


def _crossed_seeds(recorded: Mapping[str, Mapping[str, int]], more: int) -> dict[str, int | list[int]]:
    """Return all seeds of each source for a number of additional runs that share none."""
    sources = next(iter(recorded.values()))
    return {source: _extended({of_run[source] for of_run in recorded.values()}, more) for source in sources}


def _extended(recorded: Collection[int], more: int) -> int | list[int]:
    seeds = sorted(recorded)
    if seeds == list(range(len(seeds))):
        return len(seeds) + more
    return [*seeds, *range(max(seeds, default=-1) + 1, max(seeds, default=-1) + 1 + more)]


def _number(seeds: int | list[int]) -> int:
    return seeds if isinstance(seeds, int) else len(seeds)


def _arguments(seeds: Mapping[str, int | list[int]]) -> str:
    return ", ".join(f"{source}={of_source}" for source, of_source in seeds.items())


def _times(attribution: Attribution, trainings: int) -> str:
    """Return how long trainings take, in proportion to the recording."""
    ratio = trainings / len(attribution.about.get("seeds") or attribution.runs)
    times = f"{ratio:.2g}" if ratio < 99 else f"{ratio:,.0f}"
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


def _suggest(attribution: Attribution) -> NextStep | None:
    """Return how to find removals that make the training more reproducible, if there are enough runs."""
    if len(attribution.trusted().runs) < _FEWEST_TO_SUGGEST or isinstance(attribution.responses, KeptResponses):
        return None
    title = f"Remove: find {noun(attribution)}s whose removal makes the result less dependent on the seed"
    if attribution.path is None:
        return NextStep(title, "No training.", ('suggest_removals(attribution, goal="reduce_variance")',))
    command = f"lightning-dtda suggest --attribution {_quoted(attribution)} --goal reduce_variance"
    return NextStep(title, "No training.", (command,))


def _check(attribution: Attribution, command: Command | None) -> NextStep | None:
    """Return how to check the responses against retraining, if that was not done, and they are derivatives."""
    if kept_results(attribution) or not unrolled(attribution):
        return None
    title = "Check that the responses are derivatives of this training"
    cost = "About as long as attributing."
    path = attribution.path
    if command is not None and path is not None:
        question = command.given(_QUESTION)
        if not command.given(("--queries",)) and len(attribution.queries) < _CHECKED_QUERIES:
            question.append(f"--queries.indices={json.dumps(list(attribution.queries))}")
        check = shlex.join(["lightning-dtda", "check", "--ensemble", command.ensemble, *question])
        return NextStep(title, cost, (f"{check} --attribution {_quoted(attribution)}",))
    call = f"found = check(ensemble, module, data, queries=queries{_measured(attribution)})"
    return NextStep(title, cost, (call, *(() if path is None else (f"found.save({str(path)!r})",))))
