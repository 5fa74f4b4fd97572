"""Runs and directions swept together, stacked or not, give what they give one by one."""

from dataclasses import replace

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_dtda import Ensemble, TrajectoryRecorder, UnrolledDifferentiation, attribute
from lightning_dtda.estimators import sweep_costs
from tests.regression import WeightedRegressor, loader, weighted_data

SEEDS = 3
QUERIES = TensorDataset(*weighted_data(4, seed=1))
DATA = TensorDataset(*weighted_data(8))  # two batches of one size: each is traced for itself, which takes long
TOLERANCE = 1e-9
"""Relative to the largest response, in double precision."""


class Noisy(WeightedRegressor):
    def training_step(self, batch, batch_idx):
        inputs, targets, weights = batch
        moved = inputs + 0.1 * torch.randn_like(inputs)
        return (weights * (self(moved) - targets) ** 2).mean()


def adam(module):
    return torch.optim.Adam(module.parameters(), lr=0.02)


def sgd(module):
    return torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)


def with_batch_norm():
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, 1))


MODULES = {
    "a network": lambda: WeightedRegressor(adam),
    "noise in the step": lambda: Noisy(adam),
    "BatchNorm and dropout": lambda: WeightedRegressor(sgd, network=with_batch_norm),
}


@pytest.fixture
def recorded(fit, tmp_path):
    def _recorded(make, data=DATA, **arguments):
        for seed in range(SEEDS):
            pl.seed_everything(seed, verbose=False)
            recorder = TrajectoryRecorder(tmp_path, gradients="none")
            fit(make(), loader(*data.tensors), recorder, **({"max_epochs": 4} | arguments))
        return Ensemble.open(tmp_path)

    return _recorded


def responses(ensemble, module, data=DATA, **arguments):
    estimator = UnrolledDifferentiation(horizon=None, **arguments)
    found = attribute(ensemble, module, data, queries=QUERIES, estimator=estimator, progress=False)
    return found.responses


def assert_same(found, expected):
    error = (found - expected).abs().max() / expected.abs().max()
    assert error < TOLERANCE, f"relative error {error:.2e}"


@pytest.fixture
def stacking(monkeypatch):
    """Have all runs stacked, however short the training, and note the plans."""
    plans, original = [], UnrolledDifferentiation.plan

    def stacked(self, runs, question):
        plan = original(self, runs, question)
        plans.append(replace(plan, batches=(tuple(runs),), stacked=True))
        return plans[-1]

    monkeypatch.setattr(UnrolledDifferentiation, "plan", stacked)
    return plans


@pytest.mark.parametrize(
    ("make", "mode"),
    [
        pytest.param(make, mode, id=f"{name}-{mode}", marks=[pytest.mark.slow] * (name != "a network"))
        for name, make in MODULES.items()
        for mode in ("reverse", "forward")
    ],
)
def test_stacked_runs_give_what_runs_alone_give(recorded, request, make, mode):
    ensemble = recorded(make)
    alone = responses(ensemble, make(), mode=mode, runs_per_batch=1)
    request.getfixturevalue("stacking")
    assert_same(responses(ensemble, make(), mode=mode), alone)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_stacked_runs_give_it_over_accumulated_and_clipped_gradients_too(recorded, request, mode):
    make, data = MODULES["BatchNorm and dropout"], TensorDataset(*weighted_data(14))  # the last batch is smaller
    ensemble = recorded(make, data, accumulate_grad_batches=2, gradient_clip_val=0.5)
    alone = responses(ensemble, make(), data, mode=mode, runs_per_batch=1)
    request.getfixturevalue("stacking")
    assert_same(responses(ensemble, make(), data, mode=mode), alone)


@pytest.mark.slow
def test_a_short_training_is_not_worth_a_trace_and_a_long_one_is(recorded, monkeypatch):
    plans, original = [], UnrolledDifferentiation.plan
    monkeypatch.setattr(UnrolledDifferentiation, "plan", lambda *a: plans.append(original(*a)) or plans[-1])
    # not by the clock of this machine: a step one by one takes twice as long as a stacked one
    seconds = {False: 2e-6, True: 1e-6}
    monkeypatch.setattr(sweep_costs.Costs, "seconds", lambda self, replay, directions: seconds[replay.ways.is_stacked])
    make = MODULES["a network"]
    ensemble = recorded(make)
    short = responses(ensemble, make())
    monkeypatch.setattr(sweep_costs, "_WORTH_TRACING", 0.01)
    seconds |= {False: 0.08, True: 0.04}
    long = responses(ensemble, make())
    seconds |= {False: 0.2, True: 0.1}  # so long that it computes all the time
    responses(ensemble, make())
    assert [plan.stacked for plan in plans] == [False, True, False]
    assert_same(long, short)


@pytest.mark.parametrize("network", [None, with_batch_norm], ids=["plain", "BatchNorm"])
def test_runs_whose_batches_differ_in_size_are_swept_together(fit, tmp_path, request, network):
    for run, sizes in (("a", [[0, 1, 2], [3, 4, 5, 6]]), ("b", [[0, 1, 2, 3], [4, 5, 6]])):
        pl.seed_everything(0, verbose=False)
        module = WeightedRegressor(sgd, network=network)
        fit(module, DataLoader(DATA, batch_sampler=sizes), TrajectoryRecorder(tmp_path, run), max_epochs=2)
    ensemble = Ensemble.open(tmp_path)
    alone = responses(ensemble, WeightedRegressor(sgd, network=network), runs_per_batch=1)
    assert_same(responses(ensemble, WeightedRegressor(sgd, network=network), runs_per_batch=2), alone)
    request.getfixturevalue("stacking")
    assert_same(responses(ensemble, WeightedRegressor(sgd, network=network)), alone)


def test_random_numbers_of_a_training_in_single_precision_are_those_of_its_replay_in_double(fit, tmp_path):
    def make():
        return Noisy(sgd, dtype=torch.float32, network=with_batch_norm)

    pl.seed_everything(0, verbose=False)
    data = TensorDataset(*weighted_data(dtype=torch.float32))
    fit(make(), loader(*data.tensors), TrajectoryRecorder(tmp_path), max_epochs=3)
    ensemble, queries = Ensemble.open(tmp_path), TensorDataset(*weighted_data(4, seed=1, dtype=torch.float32))
    single, double = (
        attribute(
            ensemble,
            make(),
            data,
            queries=queries,
            measurement="prediction",
            estimator=UnrolledDifferentiation(precision=precision),
            progress=False,
        )
        for precision in ("recorded", "float64")
    )
    assert (single.responses.double() - double.responses).norm() < 1e-3 * double.responses.norm()
    assert double.about["drift"]["seed-0000"]["gradients"] < 1e-4
