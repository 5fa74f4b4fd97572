"""Recorded runs that tests of several estimators share."""

import lightning.pytorch as pl
import pytest
from torch.utils.data import DataLoader

from lightning_dtda import Ensemble, TrajectoryRecorder
from tests.estimators.baselines import STEPS, Classifier, classification


@pytest.fixture
def classifiers(fit, tmp_path):
    """Two short runs in double precision, with a checkpoint at every step; the last batch of an epoch is smaller."""
    for seed in range(2):
        pl.seed_everything(seed, verbose=False)
        recorder = TrajectoryRecorder(tmp_path / "classifiers", checkpoint_every="all")
        loader = DataLoader(classification(), 4, shuffle=True)
        fit(Classifier(), loader, recorder, max_steps=STEPS, max_epochs=-1)
    return Ensemble.open(tmp_path / "classifiers")
