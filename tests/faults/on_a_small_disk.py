"""Fills a small disk in the middle of recordings; the test beside this file gives it one.

python -m tests.faults.on_a_small_disk DIRECTORY
"""

import contextlib
import io
import re
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from lightning_dtda import Run, TrajectoryRecorder, cli
from lightning_dtda.errors import RecordingError
from tests.recording.modules import Regressor, shuffled


class Fill(pl.Callback):
    """Writes a file that leaves no more than ``room`` pages of the disk free."""

    def __init__(self, disk: str | Path, room: int):
        self.disk, self.room = Path(disk), room

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 20:
            self.fill()

    def fill(self):
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


def stops(arguments, message):
    """Run a command that fails for lack of space, and check that it says so in one line and leaves nothing behind."""
    written = io.StringIO()
    with contextlib.redirect_stderr(written), pytest.raises(SystemExit, match="1"):
        cli.main(arguments)
    *_, last = written.getvalue().splitlines()
    assert last.startswith(f"lightning-dtda {arguments[0]}: error:"), last
    assert re.search(message, last), last
    assert "Traceback" not in written.getvalue()


def commands(disk):
    """Fill the disk under the commands."""
    import yaml

    from tests.cli.configuration import CONFIG

    fill = {"class_path": "tests.faults.on_a_small_disk.Fill", "init_args": {"disk": str(disk), "room": 1}}
    of_fill = {"trainer": CONFIG["trainer"] | {"max_steps": 60, "callbacks": [fill]}}
    (disk / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    (disk / "fill.yaml").write_text(yaml.safe_dump(CONFIG | of_fill))
    runs, answer, queries = str(disk / "runs"), str(disk / "answer"), "--queries.indices=[0,1]"
    recording = ["record", "--config", str(disk / "fill.yaml"), "--ensemble", str(disk / "fills"), "--seeds", "20"]
    stops([*recording, "--recorder.checkpoint_every", "5"], "No space left on device.*Free disk space")
    assert [path.name for path in (disk / "fills").glob("seed-*")] == ["seed-0000"]
    (disk / "ballast").unlink()
    cli.main(["record", "--config", str(disk / "config.yaml"), "--ensemble", runs, "--seeds", "3"])
    cli.main(["attribute", "--ensemble", runs, "--output", answer, queries])
    Fill(disk, 1).fill()
    full = "No space left on device|disk space"
    stops(["record", "--config", str(disk / "config.yaml"), "--ensemble", runs, "--seeds", "9"], full)
    stops(
        ["attribute", "--ensemble", runs, "--output", str(disk / "other"), queries, "--measurement", "prediction"], full
    )
    retraining = ["retrain", "--ensemble", runs, "--removal", "reweight", "--seeds=[0,1]", "--subsets", "400"]
    stops([*retraining, "--output", str(disk / "truth"), queries], full)
    stops(["report", "--attribution", answer, "--output", str(disk / "report.html")], full)
    for kind in ("parquet", "netcdf", "zarr"):
        stops(["export", "--attribution", answer, "--output", str(disk / kind), "--format", kind], full)
    for name in ("report.html", "parquet", "netcdf", "zarr"):
        assert not (disk / name).exists()
    assert not [path for path in disk.rglob("*") if "partial" in path.name]
    (disk / "ballast").unlink()
    cli.main(["attribute", "--ensemble", runs, "--output", answer, queries])  # what was there is intact
    print("commands")


def main(disk):
    commands(disk)
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
