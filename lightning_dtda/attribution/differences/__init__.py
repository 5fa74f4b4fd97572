"""Differences between two distributions of a measurement, each given by samples."""

from lightning_dtda.attribution.differences.difference import Difference
from lightning_dtda.attribution.differences.energy import Energy
from lightning_dtda.attribution.differences.gaussian_kl import GaussianKL
from lightning_dtda.attribution.differences.known import DIFFERENCES, PAPERS, resolve_difference
from lightning_dtda.attribution.differences.mean import Location, Mean
from lightning_dtda.attribution.differences.quantile import Quantile
from lightning_dtda.attribution.differences.sliced_wasserstein import JointDifference, SlicedWasserstein
from lightning_dtda.attribution.differences.standard_errors import bootstrap, jackknife, standard_error_of
from lightning_dtda.attribution.differences.tail import Tail
from lightning_dtda.attribution.differences.variance import Variance
from lightning_dtda.attribution.differences.wasserstein import Wasserstein

__all__ = [
    "DIFFERENCES",
    "PAPERS",
    "Difference",
    "Energy",
    "GaussianKL",
    "JointDifference",
    "Location",
    "Mean",
    "Quantile",
    "SlicedWasserstein",
    "Tail",
    "Variance",
    "Wasserstein",
    "bootstrap",
    "jackknife",
    "resolve_difference",
    "standard_error_of",
]
