"""Samples of distributions: differences and their errors, intervals, tests, power, reliability, correlations, ceilings.

Pure functions of tensors, the samples along the first dimension; nothing here knows runs, models or files.
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
    "Tail",
    "Variance",
    "Wasserstein",
    "jackknife",
    "resolve_difference",
]
