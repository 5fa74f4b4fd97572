"""Inside ``Trainer.fit``: the recorder, the response tracker and the tap that learns which examples are in a batch."""

from lightning_dtda.recording.recorder import TrajectoryRecorder, run_name
from lightning_dtda.recording.recording import record
from lightning_dtda.recording.response_tracker import ResponseTracker

__all__ = ["ResponseTracker", "TrajectoryRecorder", "record", "run_name"]
