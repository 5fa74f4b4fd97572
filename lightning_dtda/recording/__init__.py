"""Callbacks inside ``Trainer.fit``: the recorder and the response tracker, and how they identify a batch's examples."""

from lightning_dtda.recording.crossed_seeds import CrossedSeeds
from lightning_dtda.recording.recorder import TrajectoryRecorder, run_name
from lightning_dtda.recording.recording import record
from lightning_dtda.recording.response_tracker import ResponseTracker

__all__ = ["CrossedSeeds", "ResponseTracker", "TrajectoryRecorder", "record", "run_name"]
