"""Inside ``Trainer.fit``: the recorder and the tap that learns which examples are in a batch."""

from lightning_dtda.recording.recorder import TrajectoryRecorder, run_name

__all__ = ["TrajectoryRecorder", "run_name"]
