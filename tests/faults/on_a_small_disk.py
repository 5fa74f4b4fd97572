"""Fills a small disk in the middle of recordings; the test beside this file gives it one.

python -m tests.faults.on_a_small_disk DIRECTORY
"""

import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from lightning_dtda import Run, TrajectoryRecorder
from lightning_dtda.errors import RecordingError
from tests.recording.modules import Regressor, shuffled


class Fill(pl.Callback):
    """Writes a file that leaves no more than ``room`` pages of the disk free."""

    def __init__(self, disk, room):
        self.disk, self.room = disk, room

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 20:
            with (self.disk / "ballast").open("wb", buffering=0) as file:
                try:
                    while file.write(bytes(4096)):
                        pass
                except OSError:  # full: give back the last pages
                    file.truncate(file.tell() - 4096 * self.room)


def train(root, *callbacks):
    pl.seed_everything(0, verbose=False)
    trainer = pl.Trainer(
        max_epochs=9,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*callbacks, TrajectoryRecorder(root, "run", checkpoint_every=5)],
    )
    trainer.fit(Regressor(), shuffled())


def main(disk):
    train(disk / "whole")
    whole = Run(disk / "whole" / "run")
    for room in range(8):
        root = disk / f"full-{room}"
        with pytest.raises(RecordingError, match=r"No space left on device.*Free disk space"):
            train(root, Fill(disk, room))
        (disk / "ballast").unlink()
        run = Run(root / "run")
        assert not run.complete
        assert 15 <= run.steps < whole.steps, run.steps
        for step in range(run.steps + 1):
            assert torch.equal(run.theta_vector(step), whole.theta_vector(step)), (room, step)
        print(room, run.steps)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
