"""Runs of a small regression, and the question that tests ask of them."""

import lightning.pytorch as pl
import torch
from torch.utils.data import TensorDataset

from lightning_dtda import Ensemble, TrajectoryRecorder, attribute
from tests.regression import WeightedRegressor, loader, weighted_data

DATA = TensorDataset(*weighted_data(dtype=torch.float32))
QUERIES = TensorDataset(*weighted_data(5, seed=1, dtype=torch.float32))


def module():
    return WeightedRegressor(lambda module: torch.optim.SGD(module.parameters(), lr=0.1), dtype=torch.float32)


def recorded(fit, root, seeds):
    for seed in range(seeds):
        pl.seed_everything(seed, verbose=False)
        fit(module(), loader(*DATA.tensors), TrajectoryRecorder(root), max_epochs=3)
    return Ensemble.open(root)


def ask(ensemble, data=DATA, queries=QUERIES, **arguments):
    return attribute(ensemble, module(), data, queries=queries, **({"progress": False} | arguments))
