"""Whether influences are told from seed noise, in sentences, and what would tell them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning_dtda.attribution.attribution import Attribution
from lightning_dtda.reporting.certainty import FDR, POWER, Tested
from lightning_dtda.reporting.findings import TopExample
from lightning_dtda.reporting.wording import counted, describe, noun
from lightning_dtda.statistics.significance import fewest_runs

_SPACE = "\N{NO-BREAK SPACE}"
_RATE = f"false discovery rate {100 * FDR:g}{_SPACE}%"
_POWER = f"power {100 * POWER:g}{_SPACE}%"


def verdict(attribution: Attribution, tests: Tested) -> str:
    """Return whether removals have an effect on one query, and if none has, what would show one.

    Args:
        attribution: The attribution.
        tests: Of one query.
    """
    return verdict_on_all(attribution, [tests])


def verdict_on_all(attribution: Attribution, of_queries: Sequence[Tested]) -> str:
    """Return on how many queries removals have an effect of one difference, and if on none, what would show one.

    Args:
        attribution: The attribution.
        of_queries: The tests of one difference, one for each query that is shown; at least one.
    """
    first, queries, what = of_queries[0], len(of_queries), noun(attribution)
    name, number = _name(attribution, first), len(first.p_values)
    told = f"is told from seed noise at {counted(first.runs, 'run')} ({_RATE})"
    if not first.possible:
        few = f"{counted(first.runs, 'run is', 'runs are')} too few to tell"
        some = f"{what}s" if number > 1 else f"the {what}"
        return f"{few} the {name} of {some} from seed noise; its test takes {first.least_runs}."
    found = [tests.discoveries for tests in of_queries if tests.discoveries]
    if not found:
        nobody = f"None of the {number} {what}s' {name}" if number > 1 else f"Not even the {what}'s {name}"
        anywhere = f", on any of {queries} queries" if queries > 1 else ""
        clearest = min(of_queries, key=lambda tests: float(tests.p_values[tests.clearest]))
        return f"{nobody} {told}{anywhere}. {_what_would(attribution, clearest)}"
    where = f"On {len(found)} of {queries} queries, the" if queries > 1 else "The"
    some = f"{min(found)} to {max(found)}" if min(found) < max(found) else f"{max(found)}"
    whose = f"of {some} of {number} {what}s" if number > 1 else f"of the {what}"
    return f"{where} {name} {whose} {told}."


def retraining_verdict(attribution: Attribution, row: TopExample) -> str:
    """Return how many retrainings would show the effect of a removal; an empty text if that is not known."""
    if row.retrainings is None or not math.isfinite(row.retrainings):
        return ""
    return (
        f"What removing {noun(attribution)} {row.name} does would show in {row.retrainings:,.0f} trainings without it "
        f"and as many on everything, of fresh seeds, if it is as large as estimated ({_POWER})."
    )


def _what_would(attribution: Attribution, tests: Tested) -> str:
    """Return with how many runs the clearest removal of a query would be told."""
    number, needed = len(tests.p_values), tests.runs_for_clearest
    fewest = fewest_runs(tests.difference, FDR / number)
    if math.isinf(fewest):
        return f"Among {number}, none can be: its test has no p-value that is small enough. Groups of examples may be."
    cannot = f" Fewer than {fewest:.0f} runs can tell none of {number}." if tests.runs < fewest and number > 1 else ""
    if math.isinf(needed):
        return f"More runs may show one.{cannot}"
    name = tests.clearest if attribution.removals is None else attribution.removals[tests.clearest]
    more, p = counted(int(needed) - tests.runs, "run"), float(tests.p_values[tests.clearest])
    return (
        f"The clearest is {noun(attribution)} {name}, p = {p:.2g}: if its effect is as large as it seems, about {more} "
        f"more would tell it ({_POWER}).{cannot}"
    )


def _name(attribution: Attribution, tests: Tested) -> str:
    return describe(tests.difference, attribution.measurement, noun(attribution)).title
