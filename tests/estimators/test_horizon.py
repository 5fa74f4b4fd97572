"""Unrolling the last steps only: against retraining in which weights change at those steps only."""

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import TensorDataset

from lightning_dtda import Ensemble, TrajectoryRecorder, UnrolledDifferentiation, attribute
from lightning_dtda.errors import AttributionError
from tests.regression import WeightedRegressor, loader, weighted_data

STEP = 1e-4
STEPS = 15


class WeightedLate(WeightedRegressor):
    """Weights count from a step on; before it they are one.

    Args:
        start: That step.
    """

    def __init__(self, start=0):
        super().__init__(lambda module: torch.optim.AdamW(module.parameters(), lr=0.02, weight_decay=0.1))
        self.start = start

    def training_step(self, batch, batch_idx):
        inputs, targets, weights = batch
        if self.global_step < self.start:
            weights = torch.ones_like(weights)
        return (weights * (self(inputs) - targets) ** 2).mean()


def train(fit, start, weights, *callbacks):
    pl.seed_everything(3, verbose=False)
    module = WeightedLate(start)
    inputs, targets, _ = weighted_data()
    fit(module, loader(inputs, targets, weights), *callbacks, max_epochs=5)
    return module


@pytest.fixture
def ask(fit, tmp_path):
    inputs, targets, ones = weighted_data()
    train(fit, 0, ones, TrajectoryRecorder(tmp_path))

    def _ask(horizon):
        return attribute(
            Ensemble.open(tmp_path),
            WeightedLate(),
            TensorDataset(inputs, targets, ones),
            queries=TensorDataset(*weighted_data(4, seed=1)),
            estimator=UnrolledDifferentiation(horizon=horizon),
            progress=False,
        )

    return _ask


@pytest.mark.parametrize("horizon", [1, 4, 7])
def test_a_horizon_leaves_out_what_examples_did_before_it(fit, ask, horizon):
    queries, wanted, _ = weighted_data(4, seed=1)
    ones = weighted_data()[2]
    expected = []
    for change in STEP * torch.eye(len(ones), dtype=torch.float64):
        moved = [train(fit, STEPS - horizon, ones + sign * change) for sign in (1, -1)]
        with torch.no_grad():
            more, less = ((module(queries) - wanted) ** 2 for module in moved)
        expected.append((less - more) / (2 * STEP))
    expected = torch.stack(expected, 1)
    found = ask(horizon).responses[0]
    assert (found - expected).abs().max() < 1e-6 * expected.abs().max()


def test_a_horizon_beyond_the_start_is_the_exact_derivative(ask):
    exact = ask(None)
    assert torch.equal(ask(STEPS + 5).responses, exact.responses)
    assert list(exact.about["adjoint_norms"]["seed-0003"]) == ["15", "12", "8", "4", "0"]


def test_auto_goes_back_to_where_the_adjoint_is_shortest(ask, monkeypatch):
    monkeypatch.setattr("lightning_dtda.estimators.sweep._GROWN", float("inf"))  # so that all checkpoints are seen
    chosen = ask("auto")
    by_steps = {step: ask(STEPS - step).responses[0] for step in (12, 8, 4)} | {0: ask(None).responses[0]}
    # each query ends at one of the checkpoints, as far as its own adjoint says
    for query, responses in enumerate(chosen.responses[0]):
        assert any(torch.equal(responses, candidate[query]) for candidate in by_steps.values())


def test_auto_of_a_training_that_forgets_is_the_exact_derivative(fit, tmp_path):
    # strong weight decay: every adjoint shrinks all the way back
    def module():
        return WeightedRegressor(lambda m: torch.optim.SGD(m.parameters(), lr=0.05, weight_decay=2.0))

    pl.seed_everything(0, verbose=False)
    data = TensorDataset(*weighted_data())
    fit(module(), loader(*data.tensors), TrajectoryRecorder(tmp_path), max_epochs=5)
    exact, auto = (
        attribute(
            Ensemble.open(tmp_path),
            module(),
            data,
            queries=data,
            estimator=UnrolledDifferentiation(horizon=horizon),
            progress=False,
        )
        for horizon in (None, "auto")
    )
    assert torch.equal(auto.responses, exact.responses)
    assert auto.about["estimator"]["horizon"] == "auto"


@pytest.mark.parametrize("horizon", [0, -3, "short", 1.5])
def test_a_horizon_that_is_none_is_refused(horizon):
    with pytest.raises(AttributionError, match="positive number of steps"):
        UnrolledDifferentiation(horizon=horizon)
