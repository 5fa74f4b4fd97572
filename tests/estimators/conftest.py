"""Recorded runs that tests of several estimators share."""

from dataclasses import replace

import lightning.pytorch as pl
import pytest
from torch.utils.data import DataLoader

from lightning_dtda import Ensemble, TrajectoryRecorder
from lightning_dtda.estimators import planning
from tests.estimators.baselines import STEPS, Classifier, Weighted, classification


@pytest.fixture
def classifiers(fit, tmp_path):
    """Two short runs in double precision, with a checkpoint at every step; the last batch of an epoch is smaller."""
    return _recorded(fit, Classifier, tmp_path / "classifiers")


@pytest.fixture
def weighted_classifiers(fit, tmp_path):
    """The same with weights of the classes: the loss of a batch is not the mean of its examples' losses."""
    return _recorded(fit, Weighted, tmp_path / "weighted")


def _recorded(fit, make, root):
    for seed in range(2):
        pl.seed_everything(seed, verbose=False)
        recorder = TrajectoryRecorder(root, checkpoint_every="all")
        fit(make(), DataLoader(classification(), 4, shuffle=True), recorder, max_steps=STEPS, max_epochs=-1)
    return Ensemble.open(root)


@pytest.fixture
def take_100_mib(monkeypatch):
    """As if a pair of a run and a query, or a removal, took 100 MiB: two at a time fit 0.25 GiB."""

    def _take_100_mib(costs):
        measured = getattr(planning, costs)
        monkeypatch.setattr(
            planning,
            costs,
            lambda *arguments: replace(measured(*arguments), per_run=0.0, per_direction=100 * 2**20, diagnosis=0.0),
        )

    return _take_100_mib
