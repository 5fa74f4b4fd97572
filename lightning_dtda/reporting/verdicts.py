"""Whether influences are significant, in sentences, and what would make them so."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning_dtda.attribution.attribution import Attribution
from lightning_dtda.reporting.certainty import FDR, NEGLIGIBLE, POWER, Outcome
from lightning_dtda.reporting.formatting import capital, count, counts, p_value
from lightning_dtda.reporting.rows import TopExample
from lightning_dtda.reporting.wording import counted, describe, noun

_SPACE = "\N{NO-BREAK SPACE}"
_RATE = f"false discovery rate {100 * FDR:g}{_SPACE}%"


def verdict(attribution: Attribution, tests: Outcome) -> str:
    """Return how many removals are significant for one query and, if none is, how many more runs it would take.

    Args:
        attribution: The attribution.
        tests: What the tests of one difference on one query say.
    """
    return verdict_on_all(attribution, [tests])


def verdict_on_all(attribution: Attribution, of_queries: Sequence[Outcome]) -> str:
    """Return on how many queries removals are significant, and what is known about the others.

    Those either have no effect for practical purposes, or the runs cannot tell; see
    :class:`~lightning_dtda.reporting.certainty.Silence`.

    Args:
        attribution: The attribution.
        of_queries: What the tests of one difference say, for each query; at least one.
    """
    first, queries, what = of_queries[0], len(of_queries), noun(attribution)
    name, number, runs = _name(attribution, first), first.removals, counted(first.runs, "run")
    if not first.possible:
        return f"{runs} cannot show whether the {name} is significant: the test needs at least {first.least_runs}."
    found = [tests.discoveries for tests in of_queries if tests.discoveries]
    if not found:
        nobody = f"No {what} has a" if number > 1 else f"The {what} has no"
        anywhere = f" on any of {queries} queries" if queries > 1 else ""
        said = [f"{nobody} significant {name}{anywhere} with {runs} ({_RATE})."]
        clearest = min(of_queries, key=lambda tests: tests.clearest_p)
        said += [_silence(attribution, of_queries), _what_would(attribution, clearest)]
        return " ".join(filter(None, said))
    where = f"On {len(found)} of {queries} queries, " if queries > 1 else ""
    have = "has" if max(found) == 1 else "have"
    who = f"{_some(found, number)} {what}s {have}" if number > 1 else f"{'the' if where else 'The'} {what} has"
    return f"{where}{who} a significant {name} ({runs}, {_RATE}). {_silence(attribution, of_queries)}".strip()


def retraining_verdict(attribution: Attribution, rows: Sequence[TopExample]) -> str:
    """Return how many retrainings would confirm the largest significant effect, or an empty text if there is none.

    Args:
        attribution: The attribution.
        rows: The top examples, or groups, of one query.
    """
    row = next((row for row in rows if row.significant), None)
    if row is None or not math.isfinite(row.retrainings_low):
        return ""
    return (
        f"Trainings needed to confirm {noun(attribution)} {row.name}: "
        f"{counts(row.retrainings_low, row.retrainings_high)} without it, and the same number with all data, with new "
        "seeds."
    )


def _silence(attribution: Attribution, of_queries: Sequence[Outcome]) -> str:
    """Return what is known about removals that are not significant: that they do nothing, or that nobody can tell."""
    known = [(tests, tests.silence) for tests in of_queries if tests.silence is not None]
    if not known:
        by_moments = of_queries[0].difference.moments and not any(tests.discoveries for tests in of_queries)
        return "Mean and spread influence show whether effects are small or cannot be seen." if by_moments else ""
    said, number, what = [], of_queries[0].removals, noun(attribution)
    none, unknown = ([getattr(silence, part) for _, silence in known] for part in ("none", "unknown"))
    tests, silence = max(known, key=lambda each: each[1].found_from / (each[1].negligible or math.inf))
    small = f"{100 * NEGLIGIBLE:g}{_SPACE}%"
    noise = f"of the {attribution.measurement}'s standard deviation over seeds"
    if any(none):
        whose = f"{_some(none, number)} {what}s have" if number > 1 else f"The {what} has"
        said.append(f"{whose} no effect larger than {small} {noise}.")
    if not any(unknown):
        return " ".join(said)
    whose = f" for {_some(unknown, number).lower()} {what}s" if number > 1 else ""
    if math.isinf(silence.found_from):
        said.append(f"Cannot tell{whose}: {_too_few(attribution, tests)}.")
        return " ".join(said)
    share = (
        math.expm1(silence.found_from)
        if tests.difference.relative
        else NEGLIGIBLE * silence.found_from / (silence.negligible or math.nan)
    )
    size = f"{silence.found_from:.3g}"
    if not math.isnan(share):
        relative = f"{_percent(share)} {noise}"
        size = relative if tests.difference.relative or len(of_queries) > 1 else f"{size}, {relative}"
    said.append(
        f"Cannot tell{whose}: with {counted(tests.runs, 'run')}, an effect is found with a probability of "
        f"{100 * POWER:g}{_SPACE}% only from {size}."
    )
    if math.isfinite(silence.runs):
        said.append(f"At most {count(silence.runs)} runs would find one of {small}.")
    return " ".join(said)


def _some(numbers: Sequence[int], of: int) -> str:
    """Return how many of all, on one query or on several."""
    if min(numbers) == of:
        return f"All {of}"
    return f"{min(numbers)} to {max(numbers)} of {of}" if min(numbers) < max(numbers) else f"{max(numbers)} of {of}"


def _percent(share: float) -> str:
    """Return a share in percent, to two digits."""
    return f"{100 * share:.2g}{_SPACE}%" if share < 1 else f"{100 * share:,.0f}{_SPACE}%"


def _too_few(attribution: Attribution, tests: Outcome) -> str:
    number = tests.removals
    fewest = tests.difference.fewest_runs(FDR / number)
    if tests.runs >= fewest:
        return f"with {tests.runs} runs, even a large effect is seldom significant among {number} {noun(attribution)}s"
    return f"with fewer than {fewest:.0f} runs, nothing can be significant among {number} {noun(attribution)}s"


def _what_would(attribution: Attribution, tests: Outcome) -> str:
    """Return how many runs would make the clearest removal of a query significant."""
    number, what = tests.removals, noun(attribution)
    fewest = tests.difference.fewest_runs(FDR / number)
    if math.isinf(fewest):
        return (
            f"More runs do not help: among {number}, no p-value of this test is small enough. Attribute fewer, larger "
            "groups of examples."
        )
    cannot = f" {capital(_too_few(attribution, tests))}." if tests.silence is None and tests.runs < fewest else ""
    low, high = tests.runs_for_clearest
    if not math.isfinite(low) or (tests.silence is not None and not tests.silence.unknown):
        return cannot.strip()
    name = tests.clearest if attribution.removals is None else attribution.removals[tests.clearest]
    p = p_value(tests.clearest_p)
    p = p if p.startswith("<") else f"= {p}"
    clearest = f"The clearest is {what} {name} (p {p})" if number > 1 else f"Its p-value is {p.lstrip('= ')}"
    return f"{clearest}: {_more_runs(low - tests.runs, high - tests.runs)}.{cannot}"


def _more_runs(low: float, high: float) -> str:
    """Return how many more runs would make a removal significant, as the end of a sentence."""
    if low > 0:
        if_any = ", if it has an effect" if math.isinf(high) else ""
        more = "run" if low == 1 and math.isinf(high) else "runs"
        return f"{counts(low, high)} more {more} would make it significant{if_any}"
    if math.isinf(high):
        return "a few more runs may make it significant, or none at all"
    return f"up to {count(high)} more runs would make it significant"


def _name(attribution: Attribution, tests: Outcome) -> str:
    return describe(tests.difference, attribution.measurement, noun(attribution)).title
