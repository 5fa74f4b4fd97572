"""A stretch of steps that does not fit the memory is rebuilt piece by piece, to the same parameters."""

import pytest
import torch

from lightning_dtda import Ensemble, TrajectoryRecorder
from lightning_dtda.replay import Replay, training_examples
from tests.regression import WeightedRegressor, loader, weighted_data


def adam(module):
    return torch.optim.Adam(module.parameters(), lr=0.01)


def batch_norm():
    nn = torch.nn
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 1))


@pytest.mark.parametrize("gradients", ["auto", "none"])
@pytest.mark.parametrize("network", [None, batch_norm], ids=["plain", "BatchNorm"])
def test_points_are_the_same_however_few_are_held(fit, tmp_path, monkeypatch, gradients, network):
    data = loader(*weighted_data())
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    recorder = TrajectoryRecorder(tmp_path, gradients=gradients, checkpoint_every=100)
    fit(WeightedRegressor(adam, network=network), data, recorder, max_epochs=9)
    replay = Replay([*Ensemble.open(tmp_path)], WeightedRegressor(adam, network=network), training_examples(data))
    ((first, last),) = replay.stretches
    whole = list(replay.backwards(first, last))
    assert [step for step, _ in whole] == list(range(26, -1, -1))
    replay.held = 4
    for (step, point), (same, other) in zip(replay.backwards(first, last), whole, strict=True):
        assert step == same
        assert torch.equal(point.theta, other.theta)
        assert torch.equal(point.gradient, other.gradient)
        assert all(torch.equal(point.states[0][name], other.states[0][name]) for name in other.states[0])


def test_no_more_steps_are_held_than_asked(fit, tmp_path, monkeypatch):
    data = loader(*weighted_data())
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    fit(WeightedRegressor(adam), data, TrajectoryRecorder(tmp_path, checkpoint_every=100), max_epochs=20)
    replay = Replay([*Ensemble.open(tmp_path)], WeightedRegressor(adam), training_examples(data))
    alive, counts = [], []
    make = replay._recorded_point

    def counted(*arguments):
        point = make(*arguments)
        alive.append(torch.utils.weak.WeakIdRef(point.gradient))
        return point

    replay._recorded_point = counted
    replay.held = 8
    for _ in replay.backwards(0, 60):
        counts.append(sum(reference() is not None for reference in alive))
    assert max(counts) <= 9
