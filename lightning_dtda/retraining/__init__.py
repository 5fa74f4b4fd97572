"""Ground truth by actual retraining: ``retrain``, subsets to remove, and training engines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_dtda.retraining.ground_truth import GroundTruth
from lightning_dtda.retraining.subsets import leave_one_out, random_subsets, top_removals
from lightning_dtda.retraining.task import Task

if TYPE_CHECKING:
    from lightning_dtda.retraining.retraining import retrain

__all__ = ["GroundTruth", "Task", "leave_one_out", "random_subsets", "retrain", "top_removals"]


def __getattr__(name: str) -> Any:
    # on first use: it imports lightning, which takes seconds and is not needed to read a stored ground truth
    if name == "retrain":
        from lightning_dtda.retraining import retraining

        return retraining.retrain
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
