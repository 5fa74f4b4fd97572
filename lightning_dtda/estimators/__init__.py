"""Estimators of responses: predicted changes of measurements when examples are removed, for each run."""

from lightning_dtda.estimators.at_checkpoints import CheckpointEstimator
from lightning_dtda.estimators.curvatures import (
    EKFAC,
    KFAC,
    Curvature,
    Diagonal,
    ExactHessian,
    FittedCurvature,
    GaussNewton,
    Hessian,
    Identity,
    Spectrum,
)
from lightning_dtda.estimators.estimator import Estimate, Estimator, Plan, Question
from lightning_dtda.estimators.exact_removal import ExactRemoval
from lightning_dtda.estimators.gradient_products import GradientCosine, GradientDot
from lightning_dtda.estimators.influence import InfluenceFunctions
from lightning_dtda.estimators.removals import Removals, resolve_removals
from lightning_dtda.estimators.source import Source
from lightning_dtda.estimators.tracin import TracIn
from lightning_dtda.estimators.trak import TRAK
from lightning_dtda.estimators.unrolled import UnrolledDifferentiation

__all__ = [
    "EKFAC",
    "KFAC",
    "TRAK",
    "CheckpointEstimator",
    "Curvature",
    "Diagonal",
    "Estimate",
    "Estimator",
    "ExactHessian",
    "ExactRemoval",
    "FittedCurvature",
    "GaussNewton",
    "GradientCosine",
    "GradientDot",
    "Hessian",
    "Identity",
    "InfluenceFunctions",
    "Plan",
    "Question",
    "Removals",
    "Source",
    "Spectrum",
    "TracIn",
    "UnrolledDifferentiation",
    "resolve_removals",
]
