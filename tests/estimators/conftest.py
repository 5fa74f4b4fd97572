"""Recorded runs that tests of several estimators share."""

from dataclasses import replace

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_dtda import Ensemble, TrajectoryRecorder
from lightning_dtda.estimators import sweep_costs
from tests.estimators.baselines import STEPS, Classifier, Weighted, classification
from tests.estimators.small_runs import Trained, data_for


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
def trained(fit, tmp_path):
    """Train and record a module."""
    pl.seed_everything(3, verbose=False)  # a test makes its modules before it has them trained

    def _trained(module, steps=12, root="runs", **arguments):
        pl.seed_everything(3, verbose=False)
        data = data_for(module, **arguments)
        loader = DataLoader(data, 7, shuffle=True)
        fit(module, loader, TrajectoryRecorder(tmp_path / root), max_steps=steps, max_epochs=-1)
        return Trained(Ensemble.open(tmp_path / root), module, data)

    return _trained


@pytest.fixture
def vectors():
    """Some vectors to be solved for."""
    return lambda size, count=3: torch.randn(count, size, generator=torch.Generator().manual_seed(1)).double()


@pytest.fixture
def take_100_mib(monkeypatch):
    """As if a pair of a run and a query, or a removal, took 100 MiB: two at a time fit 0.25 GiB."""

    def _take_100_mib(costs):
        found = getattr(sweep_costs, costs)
        monkeypatch.setattr(
            sweep_costs,
            costs,
            lambda *arguments: replace(found(*arguments), per_run=0.0, per_direction=100 * 2**20, diagnosis=0.0),
        )

    return _take_100_mib
