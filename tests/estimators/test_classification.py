"""A classifier's margins and losses, end to end, against central finite differences of real weighted retraining."""

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_dtda import Ensemble, TrajectoryRecorder, UnrolledDifferentiation, attribute
from lightning_dtda.replay import resolve_measurement

STEP = 1e-4
EXAMPLES, CLASSES = 10, 3


def labelled(count, seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    return inputs, inputs[:, :CLASSES].argmax(1)


class WeightedClassifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, CLASSES)).double()

    def forward(self, inputs):
        return self.net(inputs)

    def training_step(self, batch, batch_idx):
        losses = torch.nn.functional.cross_entropy(self(batch[0]), batch[1], reduction="none")
        return (losses * batch[2]).mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.03)


def train(fit, weights, *callbacks):
    pl.seed_everything(5, verbose=False)
    module = WeightedClassifier()
    data = TensorDataset(*labelled(EXAMPLES, 0), weights)
    fit(module, DataLoader(data, 4, shuffle=True), *callbacks, max_epochs=4)
    return module, data


def losses(module, batch):
    return torch.nn.functional.cross_entropy(module(batch[0]), batch[1], reduction="none")


MEASUREMENTS = {"margin": resolve_measurement("margin")[1], "loss": losses}


@pytest.mark.parametrize("measurement", MEASUREMENTS)
def test_responses_are_the_derivatives_of_retraining(fit, tmp_path, measurement):
    ones = torch.ones(EXAMPLES, dtype=torch.float64)
    queries = TensorDataset(*labelled(5, 1), torch.ones(5, dtype=torch.float64))
    _, data = train(fit, ones, TrajectoryRecorder(tmp_path))
    found = attribute(
        Ensemble.open(tmp_path),
        WeightedClassifier(),
        data,
        queries=queries,
        measurement=measurement,
        estimator=UnrolledDifferentiation(horizon=None),
        progress=False,
    )
    measure = MEASUREMENTS[measurement]
    expected = []
    for change in STEP * torch.eye(EXAMPLES, dtype=torch.float64):
        with torch.no_grad():
            more, less = (measure(train(fit, ones + sign * change)[0], queries.tensors) for sign in (1, -1))
        expected.append((less - more) / (2 * STEP))
    expected = torch.stack(expected, 1)
    assert (found.responses[0] - expected).abs().max() < 1e-6 * expected.abs().max()
