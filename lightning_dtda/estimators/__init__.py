"""Estimators of responses: what a removal does to a measurement, run by run."""

from lightning_dtda.estimators.estimator import Estimate, Estimator, Plan, Question
from lightning_dtda.estimators.removals import Removals, resolve_removals
from lightning_dtda.estimators.unrolled import UnrolledDifferentiation

__all__ = ["Estimate", "Estimator", "Plan", "Question", "Removals", "UnrolledDifferentiation", "resolve_removals"]
