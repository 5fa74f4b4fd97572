"""Recording on a full disk, and two hundred times in one process."""

import gc
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from lightning_dtda import Run, TrajectoryRecorder
from lightning_dtda.errors import RecordingError
from tests.recording.modules import Regressor, loader, shuffled

pytestmark = pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")


def test_a_disk_that_fills_up_is_an_error_and_the_prefix_stays(fit, tmp_path):
    class Full(pl.Callback):
        """No file may grow beyond what a manifest or a checkpoint takes: every shard fails as on a full disk."""

        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 20:
                resource.setrlimit(resource.RLIMIT_FSIZE, (1, hard))

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(RecordingError, match=r"Writing to .*run failed.*Free disk space"):
            fit(Regressor(), shuffled(), Full(), TrajectoryRecorder(tmp_path, "run", checkpoint_every=5), max_epochs=9)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    run = Run(tmp_path / "run")
    assert not run.complete
    assert 15 <= run.steps <= 25
    assert run.theta_vector(run.steps).isfinite().all()


@pytest.mark.slow
def test_a_small_disk_that_is_full_costs_only_what_was_not_yet_written_and_every_command_says_so(tmp_path):
    namespace = ["unshare", "--user", "--map-root-user", "--mount"]
    mount = f"mount -t tmpfs -o size=4m none {tmp_path}"
    if not shutil.which("unshare") or subprocess.run([*namespace, "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("this system lets no one mount a small disk")
    script = [sys.executable, "-m", "tests.faults.on_a_small_disk", str(tmp_path)]
    command = [*namespace, "sh", "-c", f'{mount} && exec "$@"', "sh", *script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len([line for line in lines if re.fullmatch(r"\d \d+", line)]) == 8
    assert "commands" in lines


@pytest.mark.slow
def test_two_hundred_runs_in_a_process_leave_nothing_behind(fit, tmp_path):
    def size():
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        files, threads = (len(list(Path(f"/proc/self/{kind}").iterdir())) for kind in ("fd", "task"))
        return pages * os.sysconf("SC_PAGE_SIZE"), files, threads

    def record(seed):
        torch.manual_seed(seed)
        fit(Regressor(), loader(), TrajectoryRecorder(tmp_path, f"run-{seed}"), max_epochs=1)

    for seed in range(20):
        record(seed)
    before = size()
    for seed in range(20, 220):
        record(seed)
    after = size()
    assert after[1:] == before[1:]  # open files and threads
    assert after[0] - before[0] < 20 * 2**20
