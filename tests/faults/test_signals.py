"""Ctrl+C and SIGTERM, by which schedulers take a machine back, end every command in order, and nothing is lost."""

import signal
import subprocess
import sys
import threading
import time

import lightning.pytorch as pl
import pytest
import yaml

from lightning_dtda import Attribution, Ensemble, GroundTruth, Run, TrajectoryRecorder, record
from lightning_dtda.attribution.attribution_store import AttributionStore
from lightning_dtda.cli import COMMANDS, main
from lightning_dtda.interruption import Terminated, ended_by_sigterm
from tests.cli.configuration import CONFIG
from tests.faults.signalling import Signal, send
from tests.recording.modules import Regressor, shuffled

pytest.importorskip("sklearn")

SIGNALS = pytest.mark.parametrize(
    ("number", "code", "name"),
    [(signal.SIGTERM, 143, "SIGTERM"), (signal.SIGINT, 130, r"Ctrl\+C")],
    ids=["SIGTERM", "SIGINT"],
)


@pytest.fixture(autouse=True)
def _handlers():
    """Start with Python's own handlers (Ray, once it was started, leaves others), and fail if any are left behind."""
    own = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in own.items()}
    yield
    after = {number: signal.signal(number, handler) for number, handler in before.items()}
    assert after == own


def configured(tmp_path, *callbacks):
    path = tmp_path / "config.yaml"
    trainer = CONFIG["trainer"] | {"callbacks": list(callbacks)}
    path.write_text(yaml.safe_dump(CONFIG | {"trainer": trainer}))
    return ["--config", str(path)]


def signalling(number, **arguments):
    return {"class_path": "tests.faults.signalling.Signal", "init_args": {"number": int(number), **arguments}}


def stopped(arguments, code, capsys):
    """Run a command that is stopped, and return what it wrote to standard error."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == code
    written = capsys.readouterr().err
    assert "Traceback" not in written
    return written


@SIGNALS
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_ends_with_the_code_and_a_line(command, number, code, name, capsys, monkeypatch):
    monkeypatch.setattr(f"lightning_dtda.cli.{command}.run", lambda arguments: send(number))
    written = stopped([command], code, capsys)
    assert written.count("\n") == 1
    assert written.startswith(f"lightning-dtda {command}: stopped by {name.replace(chr(92), '')}")


@SIGNALS
def test_recording_goes_on_after_it_was_stopped(tmp_path, capsys, number, code, name):
    ensemble = ["--ensemble", str(tmp_path / "runs"), "--seeds", "3"]
    written = stopped(["record", *configured(tmp_path, signalling(number, seed=1)), *ensemble], code, capsys)
    assert "1 of 3 runs are complete" in written
    assert "the same command continues" in written
    partial = Run(tmp_path / "runs" / "seed-0001")
    assert (partial.complete, partial.steps) == (False, 5)
    callbacks = tmp_path / "runs" / "config.yaml"  # the signal comes only once in this test
    callbacks.write_text(callbacks.read_text().replace("seed: 1", "seed: 9"))
    main(["record", *configured(tmp_path, signalling(number, seed=9)), *ensemble])
    assert [run.steps for run in Ensemble.open(tmp_path / "runs")] == [12, 12, 12]


@SIGNALS
def test_retraining_goes_on_after_it_was_stopped(tmp_path, capsys, number, code, name):
    question = ["--queries.indices=[0]", "--stacked", "false", "--subsets", "1", "--seeds=[7,8]"]
    question += ["--output", str(tmp_path / "truth")]
    written = stopped(["retrain", *configured(tmp_path, signalling(number, seed=8)), *question], code, capsys)
    assert "1 of 4 trainings are stored" in written
    main(["retrain", *configured(tmp_path, signalling(number, seed=9)), *question])
    truth = GroundTruth.load(tmp_path / "truth")
    assert truth.measurements.isfinite().all()
    assert truth.measurements.shape == (1, 2, 1)


@SIGNALS
def test_attributing_goes_on_after_it_was_stopped(tmp_path, capsys, monkeypatch, number, code, name):
    main(["record", *configured(tmp_path), "--ensemble", str(tmp_path / "runs"), "--seeds", "3"])
    add = AttributionStore.add

    def add_one(store, *arguments):
        add(store, *arguments)
        send(number)

    monkeypatch.setattr(AttributionStore, "add", add_one)
    question = ["--ensemble", str(tmp_path / "runs"), "--output", str(tmp_path / "answer"), "--queries.indices=[0]"]
    capsys.readouterr()
    written = stopped(["attribute", *question], code, capsys)
    assert "1 of 3 runs are attributed" in written
    monkeypatch.undo()
    main(["attribute", *question])
    assert len(Attribution.load(tmp_path / "answer").runs) == 3


@pytest.mark.slow
def test_a_stack_that_is_stopped_keeps_what_was_written(tmp_path, capsys, monkeypatch):
    from lightning_dtda.recording.stack_writer import StackWriter

    after_step, steps = StackWriter.after_step, []

    def stop_after_step(writer, taken):
        after_step(writer, taken)
        steps.append(taken)
        if len(steps) == 7:
            send(signal.SIGTERM)

    monkeypatch.setattr(StackWriter, "after_step", stop_after_step)
    arguments = [*configured(tmp_path), "--ensemble", str(tmp_path / "runs"), "--seeds", "4", "--stacked", "true"]
    assert "1 of 4 runs are complete" in stopped(["record", *arguments], 143, capsys)
    partial = Run(tmp_path / "runs" / "seed-0002")
    assert (partial.complete, partial.steps) == (False, 7)
    monkeypatch.undo()
    main(["record", *arguments])
    assert len(Ensemble.open(tmp_path / "runs")) == 4


def training(*callbacks):
    def make():
        trainer = pl.Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=list(callbacks),
        )
        return trainer, Regressor(), shuffled()

    return make


@pytest.mark.parametrize("step", [3, 6], ids=["within", "in the last batch"])
def test_from_python_sigterm_ends_the_program_with_its_code(tmp_path, step):
    make = training(Signal(signal.SIGTERM, seed=0, step=step))
    with pytest.raises(Terminated) as end:
        record(make, TrajectoryRecorder(tmp_path), 2, progress=False)
    assert end.value.code == 143
    assert Run(tmp_path / "seed-0000").steps == step
    assert not (tmp_path / "seed-0001").exists()


class Early(pl.Callback):
    """Ctrl+C before Lightning has set its handlers."""

    def setup(self, *args, **kwargs):
        send(signal.SIGINT)


@pytest.mark.parametrize("callback", [Signal(signal.SIGINT, seed=0, step=3), Early()], ids=["within", "before"])
def test_from_python_ctrl_c_is_a_keyboard_interrupt_and_works_again(tmp_path, callback):
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            record(training(callback), TrajectoryRecorder(tmp_path), 2, progress=False)
    assert not (tmp_path / "seed-0001").exists()


def test_an_application_s_own_handler_of_sigterm_stays():
    received = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        with ended_by_sigterm():
            send(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == [signal.SIGTERM]


def test_another_thread_than_the_main_one_sets_no_handler():
    done = []

    def work():
        with ended_by_sigterm():
            done.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [signal.SIG_DFL]


def process(arguments):
    return subprocess.run(
        [sys.executable, "-m", "lightning_dtda", *arguments], capture_output=True, text=True, start_new_session=True
    )


@pytest.mark.slow
@SIGNALS
@pytest.mark.parametrize("command", ["record", "retrain"])
def test_with_workers_a_signal_to_all_processes_is_one_line_too(tmp_path, command, number, code, name):
    # as a terminal sends Ctrl+C, and schedulers send SIGTERM
    arguments = [*configured(tmp_path, signalling(number, seed=8, to_group=True)), "--workers", "2", "--seeds=[7,8,9]"]
    if command == "record":
        arguments += ["--ensemble", str(tmp_path / "runs")]
    else:
        arguments += ["--output", str(tmp_path / "truth"), "--queries.indices=[0]", "--subsets", "1"]
    done = process([command, *arguments])
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    lines = [line for line in done.stderr.splitlines() if line.startswith(f"lightning-dtda {command}")]
    assert len(lines) == 1
    assert "the same command continues" in lines[0]


@pytest.mark.slow
def test_what_workers_had_finished_is_kept_when_one_of_them_is_killed(tmp_path):
    arguments = [*configured(tmp_path, signalling(signal.SIGKILL, seed=8)), "--ensemble", str(tmp_path / "runs")]
    done = process(["record", *arguments, "--workers", "2", "--seeds=[7,9,8]"])
    assert done.returncode == 1
    assert "A process was killed" in done.stderr
    assert "Traceback" not in done.stderr
    # seed 8 starts when one of the others is finished
    manifests = (tmp_path / "runs").glob("seed-000[79]/manifest.json")
    assert any(Run(path.parent).manifest.status == "complete" for path in manifests)


@pytest.mark.slow
@SIGNALS
@pytest.mark.parametrize("processes", [["--workers", "RayCluster"], ["--trainer.devices", "2"]], ids=["Ray", "DDP"])
def test_a_recording_on_a_cluster_or_of_several_processes_ends_so_too(tmp_path, processes, number, code, name):
    if "RayCluster" in processes:
        pytest.importorskip("ray", reason="clusters need the extra [ray]")
    config = yaml.safe_dump(CONFIG | {"trainer": CONFIG["trainer"] | {"max_steps": 100_000}})
    (tmp_path / "config.yaml").write_text(config)
    arguments = ["--config", str(tmp_path / "config.yaml"), "--ensemble", str(tmp_path / "runs"), "--seeds", "2"]
    command = [sys.executable, "-m", "lightning_dtda", "record", *arguments, *processes]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as running:
        while running.poll() is None and not list((tmp_path / "runs").glob("*/manifest.json")):
            time.sleep(0.1)
        running.send_signal(number)
        written = running.communicate()[1]
    assert running.returncode == code, written
    assert "0 of 2 runs are complete" in written
    assert "Traceback" not in written
