"""Steps that do not fit memory at once are rebuilt piece by piece, as often as is said beforehand."""

import pytest
import torch

from lightning_dtda import Ensemble, TrajectoryRecorder
from lightning_dtda.replay import Replay, training_examples
from lightning_dtda.replay.pieces import rebuilt_steps
from tests.regression import WeightedRegressor, loader, weighted_data


@pytest.fixture
def replay(fit, tmp_path):
    data = loader(*weighted_data())
    recorder = TrajectoryRecorder(tmp_path, gradients="none", checkpoint_every=1000, run="long")
    fit(WeightedRegressor(sgd), data, recorder, max_epochs=37)
    return Replay([*Ensemble.open(tmp_path)], WeightedRegressor(sgd), training_examples(data))


def sgd(module):
    return torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9)


@pytest.mark.parametrize("held", [4, 6, 8, 16, 50, 111, 200])
def test_as_many_steps_are_rebuilt_as_is_said(replay, monkeypatch, held):
    taken = []
    advance = Replay.advance
    monkeypatch.setattr(Replay, "advance", lambda self, step, point: taken.append(step) or advance(self, step, point))
    monkeypatch.setattr(replay, "held", held)
    assert [step for step, _ in replay.backwards(0, 111)] == list(range(110, -1, -1))
    assert len(taken) == rebuilt_steps(111, held)


def test_the_work_grows_with_the_logarithm_of_the_steps():
    assert rebuilt_steps(100_000, 4) < 20 * 100_000
    assert rebuilt_steps(100_000, 32) < 8 * 100_000
