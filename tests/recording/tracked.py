"""Responses that a tracker carries along with a training, against those of its record."""

import torch
from torch.utils.data import TensorDataset

from lightning_dtda import Ensemble, TrajectoryRecorder, UnrolledDifferentiation, attribute
from lightning_dtda.estimators.forward import forward_sweep
from lightning_dtda.recording import ResponseTracker
from lightning_dtda.replay import Replay, training_examples
from tests.regression import WeightedRegressor, weighted_data
from tests.trainings import train

TOLERANCE = 1e-9
"""Relative to the largest response, in double precision."""

GROUPS = [[0], [1, 4, 7], [11, 3]]
QUERIES = TensorDataset(*weighted_data(4, seed=1))


def membership():
    rows = torch.zeros(len(GROUPS), 12, dtype=torch.float64)
    for row, group in zip(rows, GROUPS, strict=True):
        row[group] = 1
    return rows


def assert_same(found, expected, tolerance=TOLERANCE):
    error = (found - expected).abs().max() / expected.abs().max()
    assert error < tolerance, f"relative error {error:.2e}"


def assert_tracked_as_recorded(fit, root, optimizer, network=None, batches="indices", **more):
    tracker = ResponseTracker(GROUPS)
    recorder = TrajectoryRecorder(root, gradients="none", batches=batches)
    train(fit, optimizer, *weighted_data(), tracker, recorder, network=network, **({"max_epochs": 3} | more))
    data = TensorDataset(*weighted_data())
    module = WeightedRegressor(optimizer, network=network)
    (position,) = forward_sweep(Replay([*Ensemble.open(root)], module, training_examples(data)), membership())
    assert tracker.responses.shape == (3, tracker.layout.size)
    assert_same(tracker.responses, position.tangents.theta[0])
    attribution = attribute(
        Ensemble.open(root),
        module,
        data,
        queries=QUERIES,
        estimator=UnrolledDifferentiation(mode="reverse", horizon=None),
        progress=False,
    )
    baseline, responses = tracker.measure(QUERIES)
    torch.testing.assert_close(baseline, attribution.baseline[0], rtol=1e-10, atol=1e-12)
    assert_same(responses, torch.stack([attribution.responses[0][:, group].sum(1) for group in GROUPS], 1))
