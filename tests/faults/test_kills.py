"""A recording that is killed at any moment leaves a prefix that is exactly what was trained, and harms no other run."""

import os
import random
import shutil
import signal
import threading
import warnings

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import TensorDataset

from lightning_dtda import Ensemble, Run, TrajectoryRecorder
from lightning_dtda.errors import TrajectoryError
from lightning_dtda.recording.seeds import is_complete
from lightning_dtda.trajectory import is_being_written
from tests.regression import WeightedRegressor, loader, weighted_data

KILLS = 50
DATA = TensorDataset(*weighted_data(dtype=torch.float32))

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]


class Kill(pl.Callback):
    """Kills the process a moment after a step, whatever it does by then."""

    def __init__(self, step, seconds):
        self.step, self.seconds = step, seconds

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.step:
            threading.Timer(self.seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()


def train(root, seed, overwrite, *callbacks):
    pl.seed_everything(seed, verbose=False)
    trainer = pl.Trainer(
        max_epochs=60,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*callbacks, TrajectoryRecorder(root, checkpoint_every=7, overwrite=overwrite)],
    )
    module = WeightedRegressor(lambda m: torch.optim.AdamW(m.parameters(), lr=0.01), dtype=torch.float32)
    trainer.fit(module, loader(*DATA.tensors))


def killed_training(root, seed, overwrite, kill):
    """Train in a process of its own and kill it; return whether it came to its end before."""
    child = os.fork()
    if child == 0:  # imports are done: a new interpreter would spend its life on them
        status = 1
        try:
            train(root, seed, overwrite, kill)
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1] == 0


def test_fifty_kills_lose_at_most_what_was_not_yet_written(tmp_path):
    train(tmp_path, 1, overwrite=False)
    train(tmp_path, 0, overwrite=False)
    reference = Run(tmp_path / "seed-0000")
    thetas = [reference.theta_vector(step) for step in range(reference.steps + 1)]
    root = tmp_path / "killed"
    shutil.copytree(tmp_path / "seed-0001", root / "seed-0001")
    bystander = {path.name: path.read_bytes() for path in (root / "seed-0001").iterdir()}
    run = root / "seed-0000"
    moments, readable, prefixes = random.Random(0), 0, set()
    for _ in range(KILLS):
        kill = Kill(moments.randint(1, reference.steps), moments.uniform(0, 0.02))
        finished = killed_training(root, 0, run.exists(), kill)
        assert not is_being_written(run)
        try:
            survivor = Run(run)
        except TrajectoryError:
            # before the first manifest there is nothing to read, and nothing that could be taken for a run
            assert not (run / "manifest.json").exists()
            continue
        readable += 1
        prefixes.add(survivor.steps)
        assert survivor.complete or not finished  # it may be killed between its end and that of its process
        assert survivor.complete == is_complete(run)
        for step in range(survivor.steps + 1 if survivor.checkpoint_steps else 0):
            assert torch.equal(survivor.theta_vector(step), thetas[step])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            complete = [each.name for each in Ensemble.open(root)]
        assert complete == (["seed-0000", "seed-0001"] if survivor.complete else ["seed-0001"])
    assert {path.name: path.read_bytes() for path in (root / "seed-0001").iterdir()} == bystander
    assert readable > KILLS // 4
    assert len(prefixes) > 2  # the moments were spread over the training
    train(root, 0, overwrite=run.exists())  # what is left is no obstacle
    assert Run(run).complete
    assert torch.equal(Run(run).theta_vector(reference.steps), thetas[-1])
