"""Responses against central finite differences of real weighted retraining, in float64.

The retrained runs know nothing of lightning_dtda: a Trainer minimises the weighted loss with the same seed and the
weights moved by plus and minus ``STEP``, along random directions: a wrong response of any example shows in all of them.
"""

import torch
from torch.utils.data import TensorDataset

from lightning_dtda import Ensemble, TrajectoryRecorder, UnrolledDifferentiation, attribute
from tests.regression import WeightedRegressor, weighted_data
from tests.trainings import train

STEP = 1e-4
"""Balances the truncation error, of order STEP squared, against rounding, of order 1e-16 / STEP."""

DIRECTIONS = 2

TOLERANCE = 1e-6
"""Relative to the largest response; at most 5e-8 is reached. The promise is 1e-5."""


def losses(module, inputs, targets):
    module.eval()
    with torch.no_grad():
        return (module(inputs) - targets) ** 2


def assert_finite_differences_agree(
    fit,
    root,
    optimizer,
    gradients="float32",
    make=WeightedRegressor,
    network=None,
    batches="indices",
    measurement="loss",
    mode="auto",
    **arguments,
):
    inputs, targets, weights = weighted_data()
    queries, wanted, ones = weighted_data(4, seed=1)
    arguments |= {"make": make, "network": network}
    recorder = TrajectoryRecorder(root, gradients=gradients, batches=batches)
    train(fit, optimizer, inputs, targets, weights, recorder, **arguments)
    attribution = attribute(
        Ensemble.open(root),
        make(optimizer, network=network),
        TensorDataset(inputs, targets, weights),
        queries=TensorDataset(queries, wanted, ones),
        measurement=measurement,
        estimator=UnrolledDifferentiation(mode=mode, horizon=None),
        progress=False,
    )
    generator = torch.Generator().manual_seed(1)
    directions = torch.randn(DIRECTIONS, len(inputs), generator=generator, dtype=torch.float64)
    directions /= directions.norm(dim=1, keepdim=True)
    expected = []
    for direction in STEP * directions:
        moved = [
            losses(train(fit, optimizer, inputs, targets, weights + sign * direction, **arguments), queries, wanted)
            for sign in (1, -1)
        ]
        expected.append(-(moved[0] - moved[1]) / (2 * STEP))
    expected = torch.stack(expected, 1)
    error = (attribution.responses[0] @ directions.T - expected).abs().max() / expected.abs().max()
    assert error < TOLERANCE, f"relative error {error:.2e}"
