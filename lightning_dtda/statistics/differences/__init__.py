"""Differences between two distributions of a measurement, each given by samples; by name or by import path."""

from __future__ import annotations

import importlib

from lightning_dtda.errors import AttributionError
from lightning_dtda.statistics.differences.difference import Difference, Moment
from lightning_dtda.statistics.differences.distances import Energy, GaussianKL, Wasserstein
from lightning_dtda.statistics.differences.mean import Location, Mean
from lightning_dtda.statistics.differences.quantile import Quantile
from lightning_dtda.statistics.differences.sliced_wasserstein import SlicedWasserstein
from lightning_dtda.statistics.differences.tail import Tail
from lightning_dtda.statistics.differences.variance import Variance

__all__ = [
    "DIFFERENCES",
    "PAPERS",
    "Difference",
    "Energy",
    "GaussianKL",
    "Location",
    "Mean",
    "Moment",
    "Quantile",
    "SlicedWasserstein",
    "Tail",
    "Variance",
    "Wasserstein",
    "resolve_difference",
    "resolve_joint",
]

PAPERS = ("mean", "variance", "wasserstein")
"""Names of the paper's differences: those that tables and reports have without being asked."""

DIFFERENCES: dict[str, Difference] = {
    difference.name: difference
    for difference in (Mean(), Variance(), Wasserstein(), Energy(), Quantile(), Tail(), GaussianKL())
}


def resolve_difference(difference: str | Difference) -> Difference:
    """Return the difference of a name or of a class's import path, between distributions of one measurement.

    Raises:
        AttributionError: If the name stands for nothing, or for a class that is no :class:`Difference`, or the
            difference is joint.

    Example:
        >>> resolve_difference("variance").name
        'variance'
    """
    found = _imported(difference) if isinstance(difference, str) else difference
    if not isinstance(found, Difference):
        raise AttributionError(
            f"{difference!r} is no Difference. Derive its class from lightning_dtda.statistics.Difference, which says "
            "what it needs."
        )
    if found.joint:
        raise AttributionError(
            f"{found.name} is between joint distributions of several queries: ask for Attribution.joint_influence."
        )
    return found


def resolve_joint(difference: Difference | None) -> Difference:
    """Return a difference between joint distributions of several measurements; the sliced Wasserstein distance of none.

    Raises:
        AttributionError: If it is of one measurement.
    """
    chosen = difference or SlicedWasserstein()
    if not chosen.joint:
        raise AttributionError(
            f"{chosen.name} is of one measurement: ask for influence. A joint difference is SlicedWasserstein()."
        )
    return chosen


def _imported(name: str) -> object:
    if name in DIFFERENCES:
        return DIFFERENCES[name]
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)()
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise AttributionError(
            f"{name!r} is no difference ({error}). Choose from {', '.join(DIFFERENCES)}, or give the import path of a "
            "class like lightning_dtda.statistics.Mean."
        ) from error
