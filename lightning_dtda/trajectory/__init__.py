"""Runs on disk: manifest, shards, writer, ``Run``, ``Ensemble``. Deals with tensors and files, not with models."""

from lightning_dtda.trajectory.ensemble import Ensemble
from lightning_dtda.trajectory.layout import ParameterLayout
from lightning_dtda.trajectory.manifest import Manifest
from lightning_dtda.trajectory.run import Checkpoint, Run
from lightning_dtda.trajectory.shard import MicroBatch
from lightning_dtda.trajectory.writer import RunWriter, is_being_written

__all__ = [
    "Checkpoint",
    "Ensemble",
    "Manifest",
    "MicroBatch",
    "ParameterLayout",
    "Run",
    "RunWriter",
    "is_being_written",
]
