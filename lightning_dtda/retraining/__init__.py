"""Many trainings: ground truth by ``retrain``, subsets, the engines that train, and seeds recorded at once."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lightning_dtda.retraining.ground_truth import GroundTruth
from lightning_dtda.retraining.subsets import leave_one_out, random_subsets, top_removals
from lightning_dtda.retraining.task import Task

if TYPE_CHECKING:
    from lightning_dtda.recording.stacked_recording import record_stacked
    from lightning_dtda.retraining.engine import Engine
    from lightning_dtda.retraining.ray_engine import RayEngine
    from lightning_dtda.retraining.retraining import retrain
    from lightning_dtda.retraining.stacked_retraining import StackedEngine
    from lightning_dtda.retraining.trainer_engine import TrainerEngine

_HOMES = {
    "Engine": "lightning_dtda.retraining.engine",
    "RayEngine": "lightning_dtda.retraining.ray_engine",
    "StackedEngine": "lightning_dtda.retraining.stacked_retraining",
    "TrainerEngine": "lightning_dtda.retraining.trainer_engine",
    "record_stacked": "lightning_dtda.recording.stacked_recording",
    "retrain": "lightning_dtda.retraining.retraining",
}

__all__ = [
    "Engine",
    "GroundTruth",
    "RayEngine",
    "StackedEngine",
    "Task",
    "TrainerEngine",
    "leave_one_out",
    "random_subsets",
    "record_stacked",
    "retrain",
    "top_removals",
]


def __getattr__(name: str) -> Any:
    # on first use: they import lightning, which takes seconds and which reading a stored ground truth does not need
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
