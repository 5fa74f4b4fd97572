"""Differences between two distributions of a measurement, each given by samples."""

from lightning_dtda.statistics.differences.difference import Difference
from lightning_dtda.statistics.differences.energy import Energy
from lightning_dtda.statistics.differences.gaussian_kl import GaussianKL
from lightning_dtda.statistics.differences.known import DIFFERENCES, PAPERS, resolve_difference
from lightning_dtda.statistics.differences.mean import Location, Mean
from lightning_dtda.statistics.differences.quantile import Quantile
from lightning_dtda.statistics.differences.sliced_wasserstein import JointDifference, SlicedWasserstein
from lightning_dtda.statistics.differences.tail import Tail
from lightning_dtda.statistics.differences.variance import Variance
from lightning_dtda.statistics.differences.wasserstein import Wasserstein

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
    "resolve_difference",
]
