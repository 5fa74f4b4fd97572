"""The differences that have a name, and those that are found by their import path."""

from __future__ import annotations

import importlib

from lightning_dtda.errors import AttributionError
from lightning_dtda.statistics.differences.difference import Difference
from lightning_dtda.statistics.differences.energy import Energy
from lightning_dtda.statistics.differences.gaussian_kl import GaussianKL
from lightning_dtda.statistics.differences.mean import Mean
from lightning_dtda.statistics.differences.quantile import Quantile
from lightning_dtda.statistics.differences.tail import Tail
from lightning_dtda.statistics.differences.variance import Variance
from lightning_dtda.statistics.differences.wasserstein import Wasserstein

PAPERS = ("mean", "variance", "wasserstein")
"""Names of the paper's differences: those that tables and reports have without being asked."""

DIFFERENCES: dict[str, Difference] = {
    difference.name: difference
    for difference in (Mean(), Variance(), Wasserstein(), Energy(), Quantile(), Tail(), GaussianKL())
}


def resolve_difference(difference: str | Difference) -> Difference:
    """Return the difference of a name or of a class's import path.

    Raises:
        AttributionError: If the name stands for nothing.

    Example:
        >>> resolve_difference("variance").name
        'variance'
    """
    if not isinstance(difference, str):
        return difference
    if difference in DIFFERENCES:
        return DIFFERENCES[difference]
    module, _, attribute = difference.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)()
    except (ImportError, AttributeError, ValueError) as error:
        raise AttributionError(
            f"{difference!r} is no difference. Choose from {', '.join(DIFFERENCES)}, or give the import path of a "
            "class like lightning_dtda.statistics.differences.Mean."
        ) from error
