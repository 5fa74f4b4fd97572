"""A recording that does not fit on the disk: what its message advises makes it fit."""

import pytest

from lightning_dtda import Run, TrajectoryRecorder
from lightning_dtda.errors import DiskSpaceError
from tests.recording.modules import Regressor, shuffled

LARGE = {"gradients": "float32", "batches": "store", "checkpoint_every": 1}
LITTLE, ENOUGH = 3_500, 4_000
"""Bytes; the training needs 3.7 KiB."""


@pytest.mark.parametrize(
    ("settings", "root", "free"),
    [
        ({"gradients": "none"}, "full", LITTLE),
        ({"batches": "indices"}, "full", LITTLE),
        ({"checkpoint_every": 3}, "full", LITTLE),
        ({}, "other", LITTLE),
        ({}, "full", ENOUGH),
    ],
)
def test_each_way_out_of_a_full_disk_lets_the_training_be_recorded(fit, tmp_path, monkeypatch, settings, root, free):
    space = {"full": LITTLE, "other": ENOUGH}
    for name in space:
        (tmp_path / name).mkdir()
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": space[path.name]}))

    def record(root, **settings):
        fit(Regressor(), shuffled(), TrajectoryRecorder(tmp_path / root, "run", **(LARGE | settings)), max_epochs=1)

    with pytest.raises(DiskSpaceError, match=r"Free some, choose another root, record less .* larger checkpoint_every"):
        record("full")
    space["full"] = free
    record(root, **settings)
    assert Run(tmp_path / root / "run").complete
