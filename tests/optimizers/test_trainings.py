"""Optimizers in trainings: what is recorded of them is what they did, and responses are the derivatives."""

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_dtda import Ensemble, TrajectoryRecorder, UnrolledDifferentiation, attribute
from lightning_dtda.optimizers import UPDATES, Muon
from tests.finite_differences import assert_finite_differences_agree, losses
from tests.optimizers.settings import ROUNDED
from tests.recording.tracked import assert_tracked_as_recorded
from tests.regression import WeightedRegressor, weighted_data
from tests.trainings import of, train

nn = torch.nn

needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")


def matrices():
    """A network for Muon, which trains nothing but matrices."""
    return nn.Sequential(nn.Linear(3, 5, bias=False), nn.Tanh(), nn.Linear(5, 1, bias=False))


def two_groups(optimizer, **arguments):
    def make(module):
        first, *others = module.parameters()
        made = optimizer([{"params": others}, {"params": [first], "lr": 0.05}], lr=0.02, **arguments)
        schedule = torch.optim.lr_scheduler.ExponentialLR(made, 0.9)
        return {"optimizer": made, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    return make


OPTIMIZERS = {
    "NAdam": two_groups(torch.optim.NAdam, weight_decay=0.1, decoupled_weight_decay=True),
    "NAdam, momentum by a schedule": lambda module: {
        "optimizer": (made := torch.optim.NAdam(module.parameters(), lr=0.02)),
        "lr_scheduler": {
            "scheduler": torch.optim.lr_scheduler.OneCycleLR(made, max_lr=0.03, total_steps=15),
            "interval": "step",
        },
    },
    "RAdam": two_groups(torch.optim.RAdam, weight_decay=0.1),
    "Adamax": two_groups(torch.optim.Adamax),
    "Adadelta": of(torch.optim.Adadelta, 0.5, weight_decay=0.1),
    "ASGD": two_groups(torch.optim.ASGD, lambd=0.3),
}
if hasattr(torch.optim, "Adafactor"):
    OPTIMIZERS["Adafactor"] = two_groups(torch.optim.Adafactor, weight_decay=0.1)


@pytest.mark.parametrize("gradients", ["float32", "none"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_responses_are_the_derivatives_of_retraining(fit, tmp_path, optimizer, gradients):
    assert_finite_differences_agree(fit, tmp_path, optimizer, gradients)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_tracked_responses_are_those_of_the_record(fit, tmp_path, optimizer):
    assert_tracked_as_recorded(fit, tmp_path, optimizer)


class Watch(pl.Callback):
    """Notes the parameters after each step."""

    def __init__(self):
        self.thetas = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.thetas.append(torch.cat([parameter.detach().flatten() for parameter in pl_module.parameters()]))


@pytest.mark.parametrize("checkpoint_every", [1, 4, 100])
@pytest.mark.parametrize("name", [*OPTIMIZERS, pytest.param("Muon", marks=needs_muon)])
def test_parameters_are_those_of_the_trainer_at_every_step(fit, tmp_path, name, checkpoint_every):
    optimizer, network = OPTIMIZERS.get(name), None
    if name == "Muon":
        optimizer, network = two_groups(torch.optim.Muon), matrices
    watch, recorder = Watch(), TrajectoryRecorder(tmp_path, gradients="float32", checkpoint_every=checkpoint_every)
    pl.seed_everything(3, verbose=False)
    module = WeightedRegressor(optimizer, dtype=torch.float32, network=network)
    fit(module, DataLoader(TensorDataset(*weighted_data(dtype=torch.float32)), 4), watch, recorder, max_epochs=4)
    (run,) = Ensemble.open(tmp_path)
    tolerance = ROUNDED.get(name, {}).get(torch.float32, 0.0)
    for step, expected in enumerate(watch.thetas, 1):
        found = run.theta(step)
        found = torch.cat([found[name].flatten() for name, _ in module.named_parameters()])
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def smooth_iteration(matrix, coefficients, steps, eps):
    """Torch's, without rounding."""
    a, b, c = coefficients
    x = matrix / matrix.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


@needs_muon
def test_without_rounding_muons_responses_are_the_derivatives_of_retraining(fit, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.optim._muon._zeropower_via_newtonschulz", smooth_iteration)
    monkeypatch.setitem(UPDATES, "torch.optim.Muon", Muon(dtype=None))
    assert_finite_differences_agree(fit, tmp_path, of(torch.optim.Muon, 0.02), network=matrices)


@needs_muon
def test_with_rounding_muons_responses_tell_what_retraining_does(fit, tmp_path):
    # weights changed by more than bfloat16 rounds away
    optimizer, change = of(torch.optim.Muon, 0.005), 0.3
    arguments = {"network": matrices, "max_epochs": 20}
    inputs, targets, weights = weighted_data()
    queries = weighted_data(4, seed=1)
    train(fit, optimizer, inputs, targets, weights, TrajectoryRecorder(tmp_path), **arguments)
    attribution = attribute(
        Ensemble.open(tmp_path),
        WeightedRegressor(optimizer, network=matrices),
        TensorDataset(inputs, targets, weights),
        queries=TensorDataset(*queries),
        estimator=UnrolledDifferentiation(horizon=None),
        progress=False,
    )
    found, expected = [], []
    for example in range(0, len(inputs), 3):
        ends = [
            losses(train(fit, optimizer, inputs, targets, moved, **arguments), *queries[:2])
            for moved in (weights + sign * change * torch.eye(len(weights))[example] for sign in (1, -1))
        ]
        expected.append((ends[1] - ends[0]) / (2 * change))
        found.append(attribution.responses[0][:, example])
    found, expected = torch.stack(found), torch.stack(expected)
    assert (found - expected).norm() < 0.05 * expected.norm()  # 0.014 over all examples
