"""What a report takes from an attribution: the top examples, their significance, the queries to show."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightning_dtda.attribution.attribution import Attribution
from lightning_dtda.errors import AttributionError
from lightning_dtda.reporting.certainty import Tested, intervals, retrainings, tested
from lightning_dtda.statistics.differences import DIFFERENCES, Difference, resolve_difference


@dataclass(frozen=True)
class TopExample:
    """An example, or a group, with a large influence on a query: a row of ``Attribution.top`` with its uncertainty.

    Influences are as they are shown: those of a relative difference, such as the spread, in percent.

    Args:
        rank: Rank, from 1 for the largest.
        position: The example's index, or the group's position.
        name: The example's index, or the group's name.
        size: Number of examples.
        influence: Influence, the change of the property if it is removed.
        standard_error: Standard error of the influence.
        mean_influence: Change of the mean if removed.
        spread_influence: Change of the standard deviation if removed, in percent; NaN with a single run.
        out_of_range: Share of runs in which the measurement is predicted where it cannot be.
        interval_low: Lower end of the influence's interval over seeds; NaN if there is none.
        interval_high: Upper end of the interval.
        p_value: p-value of no effect; NaN with too few runs.
        significant: Whether it is significant among all removals, at a false discovery rate of
            :data:`~lightning_dtda.reporting.certainty.FDR`.
        retrainings_low: Lower end of the number of retrainings without it, and as large a number with all data, that
            would show the effect; NaN with too few runs, or if the difference cannot be planned by.
        retrainings_high: Upper end, infinite if there may be no effect.
    """

    rank: int
    position: int
    name: str
    size: int
    influence: float
    standard_error: float
    mean_influence: float
    spread_influence: float
    out_of_range: float
    interval_low: float
    interval_high: float
    p_value: float
    significant: bool
    retrainings_low: float
    retrainings_high: float


def significance_on(attribution: Attribution, query: int, difference: str | Difference) -> Tested:
    """Return the tests of every removal's influence on the query at a position, over the trusted runs."""
    return tested(attribution.trusted().select([query]), difference)


def top_examples(
    attribution: Attribution, query: int, difference: str | Difference, k: int, tests: Tested | None = None
) -> list[TopExample]:
    """Return the k examples, or groups, with the largest absolute influence on the query at a position.

    Args:
        attribution: The attribution; only its trusted runs are used.
        query: Position of the query.
        difference: Difference to rank by.
        k: Number of examples or groups, at most :attr:`Attribution.most_listed`.
        tests: Result of :func:`significance_on`; ``None`` computes it.

    Raises:
        AttributionError: If ``k`` is less than one.
    """
    if k < 1:
        raise AttributionError(f"k={k}; give the number of removals to show, at least 1.")
    selected, chosen = attribution.trusted().select([query]), resolve_difference(difference)
    tests = tested(selected, chosen) if tests is None else tests
    table = selected.top(min(k, selected.most_listed), chosen, query=0).drop(columns="query")
    if attribution.removals is None:
        table = table.rename(columns={"example": "position"})
        table["name"], table["size"] = table["position"].map(str), 1
    else:
        positions = {name: position for position, name in enumerate(attribution.removals)}
        table = table.rename(columns={"removal": "name"})
        table["position"] = table["name"].map(positions)
    shown = table["position"].tolist()
    table["interval_low"], table["interval_high"] = intervals(selected, chosen, shown).tolist()
    if chosen.relative:
        table["standard_error"] *= 100 * np.exp(table["influence"])
    for column in ("influence", "interval_low", "interval_high"):
        table[column] = table[column].map(chosen.shown)
    table["spread_influence"] = table["spread_influence"].map(DIFFERENCES["spread"].shown)
    table["p_value"], table["significant"] = tests.p_values[shown].tolist(), tests.significant[shown].tolist()
    table["retrainings_low"], table["retrainings_high"] = retrainings(selected, chosen, shown).tolist()
    return [TopExample(**row) for row in table.to_dict("records")]


def about_in_brief(attribution: Attribution) -> dict[str, Any]:
    """Return an attribution's ``about``, with the sizes of the groups in place of their members, which may be many."""
    if attribution.removals is None or attribution.members is None:
        return attribution.about
    sizes = [len(group) for group in attribution.members]
    return {**attribution.about, "removals": dict(zip(attribution.removals, sizes, strict=True))}


def most_interesting(attribution: Attribution, most: int) -> list[int]:
    """Return the positions, in order, of the queries on which a single removal changes the spread most.

    With a single run, those on which it changes the mean most.

    Args:
        attribution: The attribution.
        most: Maximum number of queries.
    """
    positions = range(len(attribution.queries))
    if len(positions) <= most:
        return list(positions)
    difference = "spread" if "spread" in attribution.available_differences else "mean"
    # query by query: all influences at once would take as much memory as the responses
    largest = [float(attribution.select([query]).influence(difference).abs().max()) for query in positions]
    return sorted(sorted(positions, key=lambda query: -largest[query])[:most])


def predicted_out_of_range(attribution: Attribution) -> tuple[int, int]:
    """Return the number of queries, and of predictions for a query and a removal, that leave the range in some run."""
    if not any(map(math.isfinite, attribution.known_range)):
        return 0, 0
    # query by query: shares of all queries at once would take as much memory as the responses
    outside = [int((attribution.select([query]).out_of_range() > 0).sum()) for query in range(len(attribution.queries))]
    return sum(number > 0 for number in outside), sum(outside)


def largest_drift(attribution: Attribution, part: str) -> float | None:
    """Return the largest relative replay drift over runs, ``None`` if none was measured.

    Args:
        attribution: The attribution.
        part: ``"parameters"`` or ``"gradients"``.
    """
    drifts = [drift.get(part) for drift in attribution.about.get("drift", {}).values()]
    known = [drift for drift in drifts if drift is not None and not math.isnan(drift)]
    return max(known, default=None)


def worst_diagnosis(attribution: Attribution, part: str) -> float | None:
    """Return the largest error in the runs' diagnoses, ``None`` if there are none.

    Args:
        attribution: The attribution.
        part: ``"finite_differences"`` or ``"precision"``.
    """
    diagnoses = attribution.about.get("diagnosis", {})
    figures = [diagnoses.get(run, {}).get(part) for run in attribution.runs]
    return max((figure for figure in figures if figure is not None), default=None)


@contextmanager
def without_repeated_warnings() -> Iterator[None]:
    """Silence the warning about few runs, which every influence repeats; each report states it once."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Influences of .* runs")
        yield
