"""Differences between two distributions of a measurement, computed from samples; found by name or import path."""

from __future__ import annotations

import importlib

from lightning_dtda.errors import AttributionError
from lightning_dtda.statistics.differences.difference import Difference, Inference, Moment
from lightning_dtda.statistics.differences.distances import Energy, GaussianKL, Wasserstein
from lightning_dtda.statistics.differences.mean import Location, Mean
from lightning_dtda.statistics.differences.quantile import Quantile
from lightning_dtda.statistics.differences.sliced_wasserstein import SlicedWasserstein
from lightning_dtda.statistics.differences.source_variance import SourceVariance
from lightning_dtda.statistics.differences.spread import Spread
from lightning_dtda.statistics.differences.tail import Tail
from lightning_dtda.statistics.differences.variance import Variance
from lightning_dtda.text import did_you_mean

__all__ = [
    "BY_SOURCE",
    "DIFFERENCES",
    "PAPERS",
    "SHOWN",
    "Difference",
    "Energy",
    "GaussianKL",
    "Inference",
    "Location",
    "Mean",
    "Moment",
    "Quantile",
    "SlicedWasserstein",
    "SourceVariance",
    "Spread",
    "Tail",
    "Variance",
    "Wasserstein",
    "resolve_difference",
    "resolve_joint",
]

PAPERS = ("mean", "variance", "wasserstein")
"""Names of the differences in the paper: those by which attributions are evaluated."""

SHOWN = ("mean", "spread", "wasserstein")
"""Names of the differences that tables and reports show by default: those with an interval."""

DIFFERENCES: dict[str, Difference] = {
    difference.name: difference
    for difference in (Mean(), Spread(), Variance(), Wasserstein(), Energy(), Quantile(), Tail(), GaussianKL())
}

BY_SOURCE: dict[str, Difference] = {
    part.name: part for part in map(SourceVariance, ("initialisation", "order", "noise", "rest"))
}
"""Changes of the parts of the variance, for crossed ensembles, by name."""


def resolve_difference(difference: str | Difference) -> Difference:
    """Return the difference with a given name or import path, between distributions of one measurement.

    Raises:
        AttributionError: If the name is unknown, its class is not a :class:`Difference`, or the difference is joint.

    Example:
        >>> resolve_difference("variance").name
        'variance'
    """
    found = _imported(difference) if isinstance(difference, str) else difference
    if not isinstance(found, Difference):
        raise AttributionError(
            f"{difference!r} is not a Difference. Derive its class from lightning_dtda.statistics.Difference, whose "
            "documentation says what a difference needs."
        )
    if found.joint:
        raise AttributionError(
            f"{found.name} compares joint distributions over several queries. Call Attribution.joint_influence instead."
        )
    return found


def resolve_joint(difference: Difference | None) -> Difference:
    """Return a difference between joint distributions of several measurements; ``None`` gives sliced Wasserstein.

    Raises:
        AttributionError: If the difference compares a single measurement.
    """
    chosen = difference or SlicedWasserstein()
    if not chosen.joint:
        raise AttributionError(
            f"{chosen.name} compares a single measurement. Call Attribution.influence instead, or give a joint "
            "difference such as SlicedWasserstein()."
        )
    return chosen


def _imported(name: str) -> object:
    if (known := DIFFERENCES.get(name) or BY_SOURCE.get(name)) is not None:
        return known
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)()
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise AttributionError(
            f"Unknown difference {name!r} ({error}). Choose from {', '.join(DIFFERENCES)}, or give the import path of "
            f"a class such as lightning_dtda.statistics.Mean.{did_you_mean(name, DIFFERENCES)}"
        ) from error
