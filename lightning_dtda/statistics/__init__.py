"""Statistics on samples: differences and their errors, intervals, tests, power, reliability, correlations, ceilings.

All are pure functions of tensors with samples along the first dimension. Nothing here depends on runs, models or files.
"""

from lightning_dtda.statistics.differences import (
    DIFFERENCES,
    PAPERS,
    Difference,
    Energy,
    GaussianKL,
    Mean,
    Quantile,
    SlicedWasserstein,
    SourceVariance,
    Spread,
    Tail,
    Variance,
    Wasserstein,
    resolve_difference,
)
from lightning_dtda.statistics.resampling import jackknife

__all__ = [
    "DIFFERENCES",
    "PAPERS",
    "Difference",
    "Energy",
    "GaussianKL",
    "Mean",
    "Quantile",
    "SlicedWasserstein",
    "SourceVariance",
    "Spread",
    "Tail",
    "Variance",
    "Wasserstein",
    "jackknife",
    "resolve_difference",
]
