"""Whether influences are significant, in sentences, and what would make them so."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning_dtda.attribution.attribution import Attribution
from lightning_dtda.reporting.certainty import FDR, Tested
from lightning_dtda.reporting.findings import TopExample
from lightning_dtda.reporting.formatting import p_value
from lightning_dtda.reporting.wording import counted, describe, noun

_SPACE = "\N{NO-BREAK SPACE}"
_RATE = f"false discovery rate {100 * FDR:g}{_SPACE}%"


def verdict(attribution: Attribution, tests: Tested) -> str:
    """Return how many removals are significant for one query and, if none is, how many more runs it would take.

    Args:
        attribution: The attribution.
        tests: The tests of one difference on one query.
    """
    return verdict_on_all(attribution, [tests])


def verdict_on_all(attribution: Attribution, of_queries: Sequence[Tested]) -> str:
    """Return on how many queries removals are significant and, if none is, how many more runs it would take.

    Args:
        attribution: The attribution.
        of_queries: The tests of one difference, one for each query that is shown; at least one.
    """
    first, queries, what = of_queries[0], len(of_queries), noun(attribution)
    name, number, runs = _name(attribution, first), len(first.p_values), counted(first.runs, "run")
    if not first.possible:
        return f"{runs} cannot show whether the {name} is significant: the test needs at least {first.least_runs}."
    found = [tests.discoveries for tests in of_queries if tests.discoveries]
    if not found:
        nobody = f"No {what} has a" if number > 1 else f"The {what} has no"
        anywhere = f" on any of {queries} queries" if queries > 1 else ""
        clearest = min(of_queries, key=lambda tests: float(tests.p_values[tests.clearest]))
        return f"{nobody} significant {name}{anywhere} with {runs} ({_RATE}). {_what_would(attribution, clearest)}"
    where = f"On {len(found)} of {queries} queries, " if queries > 1 else ""
    some = f"{min(found)} to {max(found)}" if min(found) < max(found) else f"{max(found)}"
    have = "has" if some == "1" else "have"
    who = f"{some} of {number} {what}s {have}" if number > 1 else f"{'the' if where else 'The'} {what} has"
    return f"{where}{who} a significant {name} ({runs}, {_RATE})."


def retraining_verdict(attribution: Attribution, rows: Sequence[TopExample]) -> str:
    """Return how many retrainings would confirm the largest significant effect, or an empty text if there is none.

    Args:
        attribution: The attribution.
        rows: The top examples, or groups, of one query.
    """
    row = next((row for row in rows if row.significant), None)
    if row is None or row.retrainings is None or not math.isfinite(row.retrainings):
        return ""
    times = f"{row.retrainings:,.0f} times"
    return (
        f"To confirm {noun(attribution)} {row.name}: retrain {times} without it and {times} with all data, with new "
        "seeds."
    )


def _what_would(attribution: Attribution, tests: Tested) -> str:
    """Return how many runs would make the clearest removal of a query significant."""
    number, needed, what = len(tests.p_values), tests.runs_for_clearest, noun(attribution)
    fewest = tests.difference.fewest_runs(FDR / number)
    if math.isinf(fewest):
        return (
            f"More runs do not help: among {number}, no p-value of this test is small enough. Attribute fewer, larger "
            "groups of examples."
        )
    few = f" With fewer than {fewest:.0f} runs, none of {number} {what}s can be significant."
    cannot = few if tests.runs < fewest and number > 1 else ""
    if math.isinf(needed):
        return f"More runs may show one.{cannot}"
    name = tests.clearest if attribution.removals is None else attribution.removals[tests.clearest]
    p = p_value(float(tests.p_values[tests.clearest]))
    p = p if p.startswith("<") else f"= {p}"
    clearest = f"The clearest is {what} {name} (p {p})" if number > 1 else f"Its p-value is {p.lstrip('= ')}"
    return f"{clearest}: about {counted(int(needed) - tests.runs, 'more run')} would make it significant.{cannot}"


def _name(attribution: Attribution, tests: Tested) -> str:
    return describe(tests.difference, attribution.measurement, noun(attribution)).title
