"""Curvatures: the Hessian of the training objective, and approximations of it for influence functions."""

from lightning_dtda.estimators.curvatures.curvature import Curvature, FittedCurvature, Solution
from lightning_dtda.estimators.curvatures.diagonal import Diagonal
from lightning_dtda.estimators.curvatures.exact_hessian import ExactHessian
from lightning_dtda.estimators.curvatures.gauss_newton import GaussNewton
from lightning_dtda.estimators.curvatures.hessian import Hessian
from lightning_dtda.estimators.curvatures.identity import Identity
from lightning_dtda.estimators.curvatures.kronecker import EKFAC, KFAC
from lightning_dtda.estimators.curvatures.spectrum import Spectrum

__all__ = [
    "EKFAC",
    "KFAC",
    "Curvature",
    "Diagonal",
    "ExactHessian",
    "FittedCurvature",
    "GaussNewton",
    "Hessian",
    "Identity",
    "Solution",
    "Spectrum",
]
