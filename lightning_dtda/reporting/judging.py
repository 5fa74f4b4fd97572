"""The verdict on an attribution: whether it can be used, in one sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_dtda.attribution.attribution import Attribution
from lightning_dtda.evaluation.self_checks import (
    RELIABLE,
    CheckResult,
    chaos_check,
    kept_results,
    precision_check,
    unrolled,
)
from lightning_dtda.reporting.certainty import NEGLIGIBLE, Outcome
from lightning_dtda.reporting.formatting import count
from lightning_dtda.reporting.next_steps import further_runs
from lightning_dtda.reporting.wording import counted, noun

Level = Literal["good", "partial", "poor"]

_SIGNS: Mapping[Level, str] = {
    "good": "\N{CHECK MARK}",
    "partial": "\N{CIRCLE WITH LEFT HALF BLACK}",
    "poor": "\N{MULTIPLICATION X}",
}
_ONE_BY_ONE = ("agreement between runs", "replay")
"""Checks that the verdict makes itself."""


@dataclass(frozen=True)
class Verdict:
    """Whether an attribution can be used.

    Args:
        level: ``"good"``, ``"partial"`` if only a part of it can be used, or ``"poor"``.
        headline: What can be used, in a few words.
        reason: The figures behind it, and what to do if it cannot be used.
    """

    level: Level
    headline: str
    reason: str

    @property
    def sign(self) -> str:
        """A sign that says the same as the colour."""
        return _SIGNS[self.level]

    @property
    def sentence(self) -> str:
        """Headline and reason."""
        return f"{self.headline}: {self.reason}"


def judge(attribution: Attribution, outcomes: Mapping[str, Sequence[Outcome]], agreed: float, outside: int) -> Verdict:
    """Judge an attribution, by the thresholds of :func:`~lightning_dtda.check`.

    It is poor if a check failed (the stored ones of :func:`~lightning_dtda.check` included), if there are too few runs
    to tell, or if the runs do not agree on the ranking and nothing is significant, unless all effects are known to be
    too small to matter. It is good if the runs agree, and
    there are significant influences on mean and spread.

    Args:
        attribution: The attribution with all runs.
        outcomes: What the tests of the trusted runs say, for ``"mean"`` and ``"spread"``, of each query.
        agreed: Agreement of halves of the trusted runs on the mean influence, median over queries; NaN if unknown.
        outside: Number of queries with predictions out of range.
    """
    alone = attribution.responses.shape[2] == 1
    runs, queries, what = len(attribution.trusted().runs), len(attribution.queries), noun(attribution)
    if failed := _failed(attribution):
        return Verdict("poor", "Not usable", f"{failed.name} failed ({failed.figure}). {failed.advice}")
    if math.isnan(agreed) and not (alone and runs > 1):
        more = counted(int(further_runs(agreed, runs)), "more run")
        few = f"{counted(runs, 'run')} cannot show which effects are more than seed noise"
        return Verdict("poor", "Not usable yet", f"{few}; record at least {more}.")
    halves = f"agreement of halves {agreed:.2f}"
    note = f" On {outside} of {counted(queries, 'query', 'queries')}, predictions are out of range." if outside else ""
    found = _found(outcomes, what)
    means, spreads = (any(each.discoveries for each in outcomes.get(name, ())) for name in ("mean", "spread"))
    if alone:  # there is no ranking to agree on
        none = f"with {counted(runs, 'run')}, the effect of the {what} is not significant"
        if not found:
            return Verdict("partial", "No effect is shown", f"{none}.{note}")
        return Verdict("good", "Usable", f"{found}.{note}")
    if agreed < RELIABLE:
        more = _more_runs(agreed, runs, what) + note
        if not found and all(_negligible(each) for of_queries in outcomes.values() for each in of_queries):
            least = f"{100 * NEGLIGIBLE:g}\N{NO-BREAK SPACE}% of the {attribution.measurement}'s standard deviation"
            known = f"with {counted(runs, 'run')}, none has an effect larger than {least} over seeds"
            return Verdict("partial", f"No single {what} matters", f"{known}. Attribute {_larger(what)}.{note}")
        if not found:
            return Verdict("poor", "Not usable yet", f"the ranking is seed noise ({halves}); {more}")
        noise = f"the ranking of the others is seed noise ({halves})"
        return Verdict("partial", f"Only the significant {what}s are usable", f"{found}; {noise}; {more}")
    agree = f"the runs agree on the ranking ({halves})"
    if not found:
        none = f"with {counted(runs, 'run')}, no {what} has a significant influence"
        return Verdict("partial", "Only the ranking is usable", f"{agree}, but {none}.{note}")
    if not means:
        none = f"no influence on the mean is significant with {counted(runs, 'run')}"
        return Verdict("partial", "Only the spreads are usable", f"{found}, and {agree}; {none}.{note}")
    if not spreads:
        none = f"no influence on the spread is significant with {counted(runs, 'run')}"
        return Verdict("partial", "Only the means are usable", f"{found}, and {agree}; {none}.{note}")
    return Verdict("good", "Usable", f"{found}, and {agree}.{note}")


def _negligible(outcome: Outcome) -> bool:
    """Return whether no removal has an effect that matters for practical purposes."""
    return outcome.silence is not None and outcome.silence.none == outcome.removals


def _failed(attribution: Attribution) -> CheckResult | None:
    """Return the first check that failed.

    Of those that are stored, only those count that the attribution does not answer itself; they concern derivatives.
    """
    own = ("agreement between runs", "precision", "chaotic runs")
    kept = [result for result in kept_results(attribution) if result.name not in own] if unrolled(attribution) else []
    results = [*kept, precision_check(attribution), chaos_check(attribution)]
    return next((result for result in results if not result.passed), None)


def _found(outcomes: Mapping[str, Sequence[Outcome]], what: str) -> str:
    """Return what is significant, and on how many queries or for how many removals; an empty text if nothing is."""
    parts = []
    for name, of_queries in outcomes.items():
        if found := [each.discoveries for each in of_queries if each.discoveries]:
            one = f"{found[0]} of {of_queries[0].removals}"
            parts.append(
                f"the {name} ({one if len(of_queries) == 1 else f'on {len(found)} of {len(of_queries)} queries'})"
            )
    return f"{what}s significantly change {' and '.join(parts)}" if parts else ""


def _more_runs(agreed: float, runs: int, what: str) -> str:
    more = further_runs(agreed, runs)
    if math.isinf(more):
        return f"more runs may not help: remove {_larger(what)}, whose effects are larger."
    return f"record at least {'1 more run' if more == 1 else f'{count(more)} more runs'}."


def _larger(what: str) -> str:
    return "groups of examples" if what == "example" else "larger groups"
