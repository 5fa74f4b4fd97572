"""What a report picks out of an attribution: its differences, the top examples, the queries worth a page."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from lightning_dtda.attribution.attribution import Attribution
from lightning_dtda.errors import AttributionError

CLEAR = 2.0
"""Standard errors from which an influence is drawn as clear: about a 95 % interval for a single, chosen example. Of
many examples that do nothing, about one in twenty is beyond it all the same; reports say so."""


@dataclass(frozen=True)
class TopExample:
    """A training example, or a group, of large influence on one query: a row of ``Attribution.top``.

    Args:
        rank: 1 for the largest.
        position: The example's index, or the group's position.
        name: The example's index, or the group's name.
        size: Number of examples.
        influence: Of removing it.
        standard_error: Of the influence.
        mean_shift: Change of the mean when removed.
        variance_change: Change of the variance when removed.
    """

    rank: int
    position: int
    name: str
    size: int
    influence: float
    standard_error: float
    mean_shift: float
    variance_change: float

    @property
    def clear(self) -> bool:
        """Whether the influence is clear of seed noise."""
        return is_clear(self.influence, self.standard_error)


def is_clear(influence: Any, error: Any) -> Any:
    """Return whether influences, numbers or arrays, are more than :data:`CLEAR` standard errors from zero.

    Not if the error is unknown, and not an example that has no influence at all.
    """
    return abs(influence) > CLEAR * error


def one_query(attribution: Attribution, query: int) -> Attribution:
    """Return the attribution of the query at one position: what is asked of it costs one query, not all."""
    return replace(
        attribution,
        baseline=attribution.baseline[:, [query]],
        responses=attribution.responses[:, [query]],
        queries=(attribution.queries[query],),
    )


def top_examples(attribution: Attribution, query: int, difference: str, k: int) -> list[TopExample]:
    """Return the k examples, or groups, of the largest absolute influence on the query at a position.

    Raises:
        AttributionError: If ``k`` is less than one.
    """
    if k < 1:
        raise AttributionError(f"k is the number of removals to show and must be at least 1; it is {k}.")
    table = one_query(attribution, query).top(k, difference, query=0).drop(columns="query")
    if attribution.removals is None:
        table = table.rename(columns={"example": "position"})
        table["name"], table["size"] = table["position"].map(str), 1
    else:
        positions = {name: position for position, name in enumerate(attribution.removals)}
        table = table.rename(columns={"removal": "name"})
        table["position"] = table["name"].map(positions)
    return [TopExample(**row) for row in table.to_dict("records")]


def about_in_brief(attribution: Attribution) -> dict[str, Any]:
    """Return what is known of an attribution, with the groups' sizes in place of their members, which may be many."""
    if attribution.removals is None or attribution.members is None:
        return attribution.about
    sizes = [len(group) for group in attribution.members]
    return {**attribution.about, "removals": dict(zip(attribution.removals, sizes, strict=True))}


def most_interesting(attribution: Attribution, most: int) -> list[int]:
    """Return the positions, in order, of the queries on which one removal changes the variance most.

    With a single run, those whose mean moves most.

    Args:
        attribution: The attribution.
        most: Number of queries; all of them if there are no more.
    """
    positions = range(len(attribution.queries))
    if len(positions) <= most:
        return list(positions)
    difference = "variance" if "variance" in attribution.available_differences else "mean"
    # query by query: all influences at once are a copy of the responses
    largest = [float(one_query(attribution, query).influence(difference).abs().max()) for query in positions]
    return sorted(sorted(positions, key=lambda query: -largest[query])[:most])


def largest_drift(attribution: Attribution, part: str) -> float | None:
    """Return the largest relative replay drift over runs, ``None`` where none was measured.

    Args:
        attribution: The attribution.
        part: ``"parameters"`` or ``"gradients"``.
    """
    drifts = [drift.get(part) for drift in attribution.about.get("drift", {}).values()]
    measured = [drift for drift in drifts if drift is not None and not math.isnan(drift)]
    return max(measured, default=None)


def worst_diagnosis(attribution: Attribution, part: str) -> float | None:
    """Return the largest figure of the runs' diagnoses, ``None`` where none was made.

    Args:
        attribution: The attribution.
        part: ``"finite_differences"`` or ``"precision"``.
    """
    diagnoses = attribution.about.get("diagnosis", {})
    figures = [diagnoses.get(run, {}).get(part) for run in attribution.runs]
    return max((figure for figure in figures if figure is not None), default=None)


@contextmanager
def without_repeated_warnings() -> Iterator[None]:
    """Silence the warning about few runs, which each influence repeats; every report says it once in its own words."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Influences of .* runs")
        yield
