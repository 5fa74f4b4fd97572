"""What an attribution knows about itself: predictions out of range, errors of the replay."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning_dtda.attribution.attribution import Attribution
from lightning_dtda.errors import AttributionError


def about_in_brief(attribution: Attribution) -> dict[str, Any]:
    """Return an attribution's ``about``, with the sizes of the groups in place of their members, which may be many."""
    if attribution.removals is None or attribution.members is None:
        return attribution.about
    sizes = [len(group) for group in attribution.members]
    return {**attribution.about, "removals": dict(zip(attribution.removals, sizes, strict=True))}


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


def agreement(attribution: Attribution) -> float:
    """Return how well halves of the runs agree on the mean influence, median over queries; NaN with too few runs."""
    try:
        return float(attribution.reliability("mean").median())
    except AttributionError:
        return math.nan
