"""Ground truth by actual retraining: ``retrain``, ``GroundTruth``, subsets, and the engines that train."""

from __future__ import annotations

from lightning_dtda.retraining.ground_truth import GroundTruth
from lightning_dtda.retraining.task import Task

__all__ = ["GroundTruth", "Task"]
