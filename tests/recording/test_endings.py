"""However a training ends, what is on disk is readable and says how it ended."""

import re
import signal
import subprocess
import sys
import textwrap
import threading

import lightning.pytorch as pl
import pytest
import torch

from lightning_dtda import Ensemble, Run, TrajectoryRecorder
from lightning_dtda.errors import RecordingError
from lightning_dtda.trajectory import writer
from tests.recording.endings import Stop, fail
from tests.recording.modules import Regressor, assert_same, loader, shuffled


def interrupt(trainer):
    raise KeyboardInterrupt


def ask_to_stop(trainer):
    trainer.should_stop = True


@pytest.fixture
def interruptible():
    """Let SIGINT be handled again after Lightning's graceful shutdown ignores it."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


def test_a_failed_training_keeps_its_steps_and_the_reason(record, root):
    with pytest.raises(ValueError, match="not finite"):
        record(Regressor(), shuffled(), Stop(8, fail), max_epochs=3)

    run = Run(root / "run")
    assert (run.manifest.status, run.manifest.reason) == ("incomplete", "ValueError: the loss is not finite")
    assert run.steps == 8
    assert run.theta(8).keys() == dict(Regressor().named_parameters()).keys()


@pytest.mark.usefixtures("interruptible")
def test_an_interrupted_training_keeps_its_steps_and_the_reason(record, root):
    with pytest.raises(SystemExit):
        record(Regressor(), shuffled(), Stop(8, interrupt), max_epochs=3)

    run = Run(root / "run")
    assert (run.manifest.status, run.manifest.reason) == ("incomplete", "KeyboardInterrupt")
    assert run.steps == 8


def test_the_prefix_of_a_failed_training_is_that_of_the_whole(record, fit, root):
    pl.seed_everything(7, verbose=False)
    whole = record(Regressor(), shuffled(), max_epochs=3)
    pl.seed_everything(7, verbose=False)
    with pytest.raises(ValueError, match="not finite"):
        fit(Regressor(), shuffled(), Stop(8, fail), TrajectoryRecorder(root, "failed"), max_epochs=3)

    prefix = Run(root / "failed")

    for step in range(prefix.steps):
        assert prefix.batch_indices(step).tolist() == whole.batch_indices(step).tolist()
        assert_same(prefix.gradient(step), whole.gradient(step))
        assert_same(prefix.theta(step + 1), whole.theta(step + 1))


@pytest.mark.parametrize(
    ("callbacks", "arguments", "steps"),
    [([], {"max_epochs": 2}, 12), ([], {"max_steps": 8}, 8), ([Stop(7, ask_to_stop)], {"max_epochs": 3}, 8)],
    ids=["after its epochs", "after max_steps", "by should_stop"],
)
def test_a_training_that_stops_of_itself_is_complete(record, callbacks, arguments, steps):
    run = record(Regressor(), shuffled(), *callbacks, **arguments)

    assert run.complete
    assert (run.manifest.reason, run.steps) == (None, steps)
    assert run.checkpoint_steps[-1] == steps


def test_a_training_that_fails_before_its_first_step_leaves_no_run(record, root):
    with pytest.raises(ValueError, match="not finite"):
        record(Regressor(), shuffled(), Stop(0, fail), max_epochs=1)

    assert not (root / "run").exists()


def test_micro_batches_whose_step_was_never_taken_are_not_recorded(record, root):
    class FailsInTheSixthBatch(Regressor):
        def training_step(self, batch, batch_idx):
            if batch_idx == 5:
                raise ValueError("in the middle of a step")
            return super().training_step(batch, batch_idx)

    module = FailsInTheSixthBatch()
    with pytest.raises(ValueError, match="middle"):
        record(module, shuffled(), max_epochs=1, accumulate_grad_batches=3)

    run = Run(root / "run")
    assert run.steps == 1
    assert run.batch_indices(0).tolist() == torch.cat(module.seen[:3]).tolist()


KILLED = """
    import os
    import signal
    import sys

    import lightning.pytorch as pl
    import torch

    from lightning_dtda import TrajectoryRecorder
    from tests.recording.endings import Stop
    from tests.recording.modules import Regressor, shuffled

    torch.set_num_threads(1)
    pl.seed_everything(7)
    recorder = TrajectoryRecorder(sys.argv[1], checkpoint_every=5)
    kill = Stop(43, lambda trainer: os.kill(os.getpid(), signal.SIGKILL))
    trainer = pl.Trainer(
        max_epochs=20, callbacks=[recorder, kill], accelerator="cpu", logger=False, enable_checkpointing=False
    )
    trainer.fit(Regressor(), shuffled())
"""


@pytest.mark.slow
def test_a_killed_training_leaves_a_readable_prefix_that_says_so(record, root):
    process = subprocess.run([sys.executable, "-c", textwrap.dedent(KILLED), str(root)], capture_output=True)
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()

    killed = Run(root / "seed-0007")

    assert not killed.complete
    # no more files wait in memory than the writer's queue holds and the one that is being written
    assert 43 - 5 * (writer._QUEUE_LENGTH + 1) <= killed.steps <= 43
    pl.seed_everything(7, verbose=False)
    whole = record(Regressor(), shuffled(), max_epochs=20, recorder={"checkpoint_every": 5})
    for step in range(killed.steps):
        assert killed.batch_indices(step).tolist() == whole.batch_indices(step).tolist()
        assert_same(killed.theta(step + 1), whole.theta(step + 1))
    with pytest.warns(UserWarning, match=rf"seed-0007 \({killed.steps} steps, still recording or killed\)"):
        assert [run.name for run in Ensemble.open(root)] == ["run"]


class Reader(pl.Callback):
    """Opens the run after every step of the training that writes it, and reads all that it claims to hold."""

    def __init__(self, directory):
        self.directory = directory
        self.steps = []

    def on_train_batch_end(self, *args):
        run = Run(self.directory)
        self.steps.append(run.steps)
        assert run.manifest.status == "recording"
        if run.checkpoint_steps:  # the very first may still be on its way
            for step in range(run.steps + 1):
                run.theta(step)


def test_a_run_can_be_read_at_any_time_while_it_is_written(fit, root):
    reader = Reader(root / "run")

    fit(Regressor(), shuffled(), TrajectoryRecorder(root, "run", checkpoint_every=2), reader, max_epochs=5)

    assert reader.steps == sorted(reader.steps)
    assert max(reader.steps) > 0
    assert not [path for path in (root / "run").iterdir() if path.suffix == ".partial"]


def test_files_are_written_off_the_training_thread(record, monkeypatch):
    threads = set()
    write = writer.write_tensors

    def note_thread(path, *arguments):
        threads.add(threading.current_thread().name)
        return write(path, *arguments)

    monkeypatch.setattr(writer, "write_tensors", note_thread)

    record(Regressor(), shuffled(), max_epochs=1)

    assert threads == {"lightning-dtda-writer"}


def fill_disk(monkeypatch, files):
    """Let the disk be full after a number of files."""
    written = []
    write = writer.write_tensors

    def write_or_fail(path, *arguments):
        if len(written) == files:
            raise OSError(28, "No space left on device")
        written.append(path)
        return write(path, *arguments)

    monkeypatch.setattr(writer, "write_tensors", write_or_fail)


@pytest.mark.parametrize("files", [2, 3, 8])
def test_a_full_disk_stops_the_training_naming_the_directory(record, root, monkeypatch, files):
    fill_disk(monkeypatch, files)
    module = Regressor()

    named = re.escape(str(root / "run"))
    with pytest.raises(RecordingError, match=f"{named} failed: .*No space left.*Free disk space"):
        record(module, shuffled(), max_epochs=50, recorder={"checkpoint_every": 2})

    assert module.trainer.global_step < 100
    run = Run(root / "run")
    assert run.manifest.status == "incomplete"
    assert run.manifest.reason == "writing failed: [Errno 28] No space left on device"
    # the checksums of the examples, the first parameters, then steps and parameters in turn
    assert run.steps == 2 * ((files - 1) // 2)


def test_a_disk_that_is_full_at_the_very_end_is_an_error_too(record, root, monkeypatch):
    fill_disk(monkeypatch, 3)

    with pytest.raises(RecordingError, match="No space left"):
        record(Regressor(), shuffled(), max_epochs=1, recorder={"checkpoint_every": 100})

    assert not Run(root / "run").complete


def test_a_full_disk_does_not_hide_why_the_training_failed(record, root, monkeypatch):
    fill_disk(monkeypatch, 2)

    with pytest.raises(ValueError, match="not finite"):
        record(Regressor(), shuffled(), Stop(4, fail), max_epochs=1, recorder={"checkpoint_every": 100})

    assert not Run(root / "run").complete


def test_one_recorder_records_one_training_after_another(fit, root):
    recorder = TrajectoryRecorder(root)
    for seed in (0, 1):
        pl.seed_everything(seed, verbose=False)
        fit(Regressor(), loader(), recorder, max_epochs=1)

    runs = Ensemble.open(root)

    assert [run.name for run in runs] == ["seed-0000", "seed-0001"]
    assert not torch.equal(runs[0].theta_vector(0), runs[1].theta_vector(0))
