"""Trainings of two processes: each records what it sees, and the run is that of one training."""

import os
import subprocess
import sys
import textwrap

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_dtda import (
    Ensemble,
    Run,
    TrajectoryRecorder,
    UnrolledDifferentiation,
    attribute,
)
from lightning_dtda.errors import TrajectoryError
from lightning_dtda.recording import ResponseTracker
from lightning_dtda.trajectory import RunWriter
from tests.recording.endings import Stop, fail
from tests.recording.processes import EXAMPLES, sgd, train
from tests.regression import Augmented, WeightedRegressor, loader, weighted_data
from tests.trajectory.runs import manifest, records

STEP = 1e-4
"""Of finite differences."""


def adamw(module):
    return torch.optim.AdamW(module.parameters(), lr=0.02, weight_decay=0.1)


def with_dropout():
    nn = torch.nn
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Dropout(0.4), nn.Linear(5, 1))


def with_batch_norm():
    nn = torch.nn
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5, momentum=0.3), nn.Tanh(), nn.Linear(5, 1))


class Watch(pl.Callback):
    """Leaves behind what each process got: a route of its own to the batches."""

    def __init__(self, path):
        self.path = path
        self.batches = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append(batch[0].clone())

    def on_train_end(self, trainer, pl_module):
        torch.save(self.batches, self.path / f"{trainer.global_rank}.pt")


class KeepTrained(pl.Callback):
    """Leaves the trained module behind: that of the parent process stays as it was."""

    def __init__(self, path):
        self.path = path

    def on_train_end(self, trainer, pl_module):
        if trainer.is_global_zero:
            torch.save(pl_module.state_dict(), self.path)


def ask(root, network=None, **settings):
    queries, wanted, ones = weighted_data(4, seed=1)
    inputs, targets, weights = weighted_data(EXAMPLES)
    return attribute(
        Ensemble.open(root),
        WeightedRegressor(sgd, network=network),
        TensorDataset(inputs, targets, weights),
        queries=TensorDataset(queries, wanted, ones),
        estimator=UnrolledDifferentiation(horizon=None, **settings),
        progress=False,
    )


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_each_process_records_what_it_sees(tmp_path, workers):
    inputs, targets, weights = weighted_data(EXAMPLES)
    data = loader(inputs, targets, weights, workers=workers)
    train(TrajectoryRecorder(tmp_path / "runs"), Watch(tmp_path), data=data, accumulate_grad_batches=2)

    run = Run(tmp_path / "runs" / "seed-0003")
    assert run.complete
    assert run.steps == 3  # 13 examples in 2 processes make 2 batches of at most 4 for each
    micro_batches = [part for step in range(run.steps) for part in run.micro_batches(step)]
    for process in (0, 1):
        batches = torch.load(tmp_path / f"{process}.pt")
        own = [part for part in micro_batches if part.process == process]
        assert len(own) == len(batches) == 6
        for part, batch in zip(own, batches, strict=True):
            assert torch.equal(inputs[part.indices], batch)


ALIKE = {
    "SGD": {},
    "AdamW, clipped": {"optimizer": adamw, "gradient_clip_val": 0.5},
    "accumulated": {"accumulate_grad_batches": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("gradients", ["float32", "none"])
@pytest.mark.parametrize("arguments", ALIKE.values(), ids=ALIKE)
def test_responses_are_those_of_the_same_training_in_one_process(tmp_path, arguments, gradients):
    recorder = {"gradients": gradients, "checkpoint_every": 4}
    train(TrajectoryRecorder(tmp_path / "two", "run", **recorder), **arguments)
    two = Run(tmp_path / "two" / "run")
    # the batches of both processes one after the other; their gradients are averaged
    batches = [part.indices.tolist() for step in range(two.steps) for part in two.micro_batches(step)]
    data = DataLoader(TensorDataset(*weighted_data(EXAMPLES)), batch_sampler=batches)
    together = arguments | {"accumulate_grad_batches": 2 * arguments.get("accumulate_grad_batches", 1)}
    one = TrajectoryRecorder(tmp_path / "one", "run", **recorder)

    train(one, data=data, **(together | {"max_epochs": 1, "devices": 1, "strategy": "auto"}))

    assert (tmp_path / "one" / "run").exists()
    for step in Run(tmp_path / "one" / "run").checkpoint_steps:
        theta = Run(tmp_path / "one" / "run").theta_vector(step)
        torch.testing.assert_close(two.theta_vector(step), theta, rtol=1e-12, atol=1e-12)
    found, expected = ask(tmp_path / "two").responses, ask(tmp_path / "one").responses
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


@pytest.mark.parametrize("gradients", ["float32", "none"])
def test_dropout_is_replayed_in_each_process(tmp_path, gradients):
    # each step's gradient, or the parameters at a checkpoint, are compared with the record
    train(TrajectoryRecorder(tmp_path, gradients=gradients), network=with_dropout, accumulate_grad_batches=2)

    drift = ask(tmp_path, network=with_dropout).about["drift"]["seed-0003"]

    assert drift["parameters"] < 1e-12


def test_stored_batches_are_replayed(tmp_path):
    data = loader(*weighted_data(EXAMPLES), dataset=Augmented)
    train(TrajectoryRecorder(tmp_path, gradients="none", batches="store"), data=data)

    assert ask(tmp_path).about["drift"]["seed-0003"]["parameters"] < 1e-12


@pytest.mark.slow
def test_statistics_of_batch_norm_are_those_of_the_first_process(tmp_path):
    train(TrajectoryRecorder(tmp_path / "runs"), network=with_batch_norm)
    answer = ask(tmp_path / "runs", network=with_batch_norm)
    queries, wanted, _ = weighted_data(4, seed=1)

    for example in answer.responses[0].abs().amax(0).argsort(descending=True)[:3].tolist():
        values = []
        for sign in (1, -1):
            weights = torch.ones(EXAMPLES, dtype=torch.float64)
            weights[example] += sign * STEP
            train(KeepTrained(tmp_path / "trained.pt"), weights=weights, network=with_batch_norm)
            module = WeightedRegressor(sgd, network=with_batch_norm)
            module.load_state_dict(torch.load(tmp_path / "trained.pt"))
            with torch.no_grad():
                values.append((module.eval()(queries) - wanted) ** 2)
        difference = -(values[0] - values[1]) / (2 * STEP)
        found = answer.responses[0, :, example]
        assert (found - difference).abs().max() < 1e-6 * difference.abs().max()


def test_forward_and_reverse_mode_agree(tmp_path):
    train(TrajectoryRecorder(tmp_path), accumulate_grad_batches=2, network=with_batch_norm)
    forward, reverse = (ask(tmp_path, mode=mode, network=with_batch_norm).responses for mode in ("forward", "reverse"))
    assert (forward - reverse).abs().max() < 1e-9 * reverse.abs().max()


def test_a_tracker_of_responses_refuses_several_processes():
    with pytest.raises(Exception, match="2 processes, and none of them sees all examples"):
        train(ResponseTracker([[0]]))


def test_it_goes_on_from_a_checkpoint(tmp_path):
    saver = ModelCheckpoint(tmp_path / "saved", "{step}", every_n_train_steps=3, save_top_k=-1)
    with pytest.raises(Exception, match="not finite"):
        train(TrajectoryRecorder(tmp_path / "runs"), Stop(5, fail), saver, optimizer=adamw, max_epochs=4)
    saver = ModelCheckpoint(tmp_path / "saved", "{step}", every_n_train_steps=3, save_top_k=-1)
    train(
        TrajectoryRecorder(tmp_path / "runs"),
        saver,
        optimizer=adamw,
        max_epochs=4,
        ckpt_path=tmp_path / "saved" / "step=3.ckpt",
    )

    run = Run(tmp_path / "runs" / "seed-0003")
    assert (run.complete, run.steps) == (True, 3 + 5)
    assert [[part.process for part in run.micro_batches(step)] for step in range(run.steps)] == [[0, 1]] * run.steps
    assert ask(tmp_path / "runs").about["drift"]["seed-0003"]["parameters"] < 1e-12


def test_what_one_process_refuses_stops_all(tmp_path):
    (tmp_path / "seed-0003").mkdir()

    # raised by whichever process is heard first, with the message of the one that refused
    with pytest.raises(Exception, match=r"seed-0003 exists\. Choose another run name"):
        train(TrajectoryRecorder(tmp_path))

    assert not list((tmp_path / "seed-0003").iterdir())


def test_a_training_that_fails_is_not_complete(tmp_path):
    with pytest.raises(Exception, match="not finite"):
        train(TrajectoryRecorder(tmp_path), Stop(5, fail), max_epochs=4)

    # the first process to fail has the others killed
    run = Run(tmp_path / "seed-0003")
    assert not run.complete
    assert run.steps <= 5
    assert all(len(run.micro_batches(step)) == 2 for step in range(run.steps))
    with pytest.warns(UserWarning, match="were left out"), pytest.raises(TrajectoryError, match="no complete"):
        Ensemble.open(tmp_path)


def test_the_steps_of_a_killed_training_are_those_of_its_slowest_process(tmp_path):
    for directory, steps, processes in ((tmp_path / "run", 5, 2), (tmp_path / "run" / "process-1", 3, 1)):
        directory.mkdir()
        writer = RunWriter(directory, manifest(gradients="none", processes=processes))
        for step in range(steps):
            writer.add_shard(step, step + 1, records(step, step + 1, None))
        writer.close("recording")

    run = Run(tmp_path / "run")

    assert run.steps == 3
    assert [len(run.micro_batches(step)) for step in range(3)] == [4] * 3
    torch.testing.assert_close(run.coefficients(0), torch.tensor([0.5, 0.5, 1.0] * 2, dtype=torch.float64) / 4)


def test_a_process_whose_record_is_missing_is_an_error(tmp_path):
    (tmp_path / "run").mkdir()
    RunWriter(tmp_path / "run", manifest(processes=2)).close("complete")

    with pytest.raises(TrajectoryError, match=r"process-1/manifest.json does not exist"):
        Run(tmp_path / "run")


SCRIPT = """
    import sys

    import torch

    torch.set_num_threads(1)
    from lightning_dtda import TrajectoryRecorder
    from tests.recording.processes import train

    if __name__ == "__main__":
        train(TrajectoryRecorder(sys.argv[1]), strategy=sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "ddp_spawn"])
def test_processes_that_are_started_are_recorded_like_forked_ones(tmp_path, strategy):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    command = [sys.executable, str(script), str(tmp_path / "started"), strategy]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    started = subprocess.run(command, capture_output=True, timeout=300, env=environment)
    assert started.returncode == 0, started.stderr.decode()
    train(TrajectoryRecorder(tmp_path / "forked"))

    first, second = (Run(tmp_path / name / "seed-0003") for name in ("started", "forked"))

    assert first.complete
    assert first.steps == second.steps
    for step in range(first.steps):
        assert first.batch_indices(step).tolist() == second.batch_indices(step).tolist()
        assert torch.equal(first.gradient_vector(step), second.gradient_vector(step))
