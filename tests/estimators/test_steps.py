"""Training steps of any kind, end to end: responses against finite differences of real weighted retraining."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from lightning_dtda import Ensemble, TrajectoryRecorder, attribute
from tests.finite_differences import assert_finite_differences_agree
from tests.regression import WeightedRegressor, weighted_data
from tests.trainings import of, sgd, train


def squared_error(module, batch):
    """What is measured of a query: a step's own loss may be scaled, or random."""
    return (module(batch[0]) - batch[1]) ** 2


class Step(WeightedRegressor):
    """Its loss is the mean of weighted errors, unless said otherwise."""

    def errors(self, inputs, targets):
        return (self(inputs) - targets) ** 2


class Summed(Step):
    def training_step(self, batch, batch_idx):
        inputs, targets, weights = batch
        return 0.2 * (weights * self.errors(inputs, targets)).sum()


class DividedByItsBatch(Step):
    """As class weights do: the divisor is that of all examples of the batch, whatever their weights."""

    def training_step(self, batch, batch_idx):
        inputs, targets, weights = batch
        importance = inputs[:, 0].exp()
        return (weights * importance * self.errors(inputs, targets)).sum() / importance.sum()


class Noisy(Step):
    """Draws from all generators that there are."""

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        self.noise, self.rng = torch.Generator().manual_seed(1), np.random.default_rng(2)

    def training_step(self, batch, batch_idx):
        inputs, targets, weights = batch
        inputs = inputs + 0.2 * torch.randn_like(inputs) + 0.2 * torch.randn(3, generator=self.noise)
        scale = 1 + 0.3 * np.random.rand() + 0.1 * random.random() + 0.1 * self.rng.random()
        return scale * (weights * self.errors(inputs, targets)).mean()


class Mixing(Step):
    """Mixes each example with another one of its batch; what a row contributes is its own."""

    def training_step(self, batch, batch_idx):
        inputs, targets, weights = batch
        share = float(torch.distributions.Beta(2.0, 2.0).sample())
        other = torch.randperm(len(inputs))
        mixed = share * inputs + (1 - share) * inputs[other]
        return (weights * self.errors(mixed, share * targets + (1 - share) * targets[other])).mean()


class Looking(Step):
    """Clips its gradients itself, by the value of the loss."""

    def training_step(self, batch, batch_idx):
        inputs, targets, weights = batch
        loss = (weights * self.errors(inputs, targets)).mean()
        return loss if loss.item() < 0.5 else 0.5 * loss


class Transferring(Step):
    """Augments batches on their way to the step."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        if not self.trainer.training:
            return batch
        return [batch[0] + 0.2 * torch.randn_like(batch[0]), *batch[1:]]


class Penalised(Step):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + 0.05 * sum((p**2).sum() for p in self.parameters())


class Variational(Step):
    """Two terms of each example, and a random number between them."""

    def training_step(self, batch, batch_idx):
        inputs, targets, weights = batch
        mean = self(inputs)
        sampled = mean + 0.3 * torch.exp(0.1 * mean) * torch.randn_like(mean)
        return (weights * (sampled - targets) ** 2).mean() + 0.1 * (weights * (mean**2 + mean.exp())).mean()


class Annealed(Step):
    """Depends on the epoch, the step, the learning rate and the length of the training."""

    def training_step(self, batch, batch_idx):
        progress = self.global_step / self.trainer.estimated_stepping_batches
        rate = self.optimizers().param_groups[0]["lr"]
        return super().training_step(batch, batch_idx) * (
            1 + progress + 0.1 * self.current_epoch + rate + 0.1 * batch_idx
        )


class PartlyUsed(Step):
    """Has a layer that the loss does not use."""

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        self.unused = nn.Linear(2, 2).double()


class Remembering(Step):
    """Keeps what it computes, in lists and attributes."""

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        self.losses, self.last = [], None

    def training_step(self, batch, batch_idx):
        self.last = super().training_step(batch, batch_idx)
        self.losses.append(self.last)
        self.log("mean", torch.stack(self.losses).mean().detach())
        return {"loss": self.last, "batch": batch}


STEPS = (Summed, DividedByItsBatch, Noisy, Mixing, Looking, Transferring, Penalised, Variational, Annealed, Remembering)


@pytest.mark.parametrize("make", STEPS)
def test_any_step_is_followed(fit, tmp_path, make):
    assert_finite_differences_agree(
        fit, tmp_path, sgd(momentum=0.9), make=make, measurement=squared_error, max_epochs=2
    )


@pytest.mark.parametrize("make", [Noisy, DividedByItsBatch])
def test_any_step_is_followed_over_accumulated_gradients_without_a_record_of_them(fit, tmp_path, make):
    assert_finite_differences_agree(
        fit,
        tmp_path,
        of(torch.optim.AdamW),
        "none",
        make=make,
        measurement=squared_error,
        max_epochs=2,
        accumulate_grad_batches=2,
    )


def test_parameters_that_the_loss_does_not_use_stay_as_they_are(fit, tmp_path):
    # AdamW would let them decay, had they a gradient
    assert_finite_differences_agree(
        fit, tmp_path, of(torch.optim.AdamW, weight_decay=0.1), make=PartlyUsed, max_epochs=2
    )


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cells, self.last = nn.LSTM(1, 4, batch_first=True), nn.Linear(4, 1)

    def forward(self, inputs):
        return self.last(self.cells(inputs.unsqueeze(-1))[0][:, -1])


NETWORKS = {
    "LSTM": Recurrent,
    "GroupNorm": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 4, 2), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(8, 1)
    ),
    "PReLU": lambda: nn.Sequential(nn.Linear(3, 5), nn.PReLU(5), nn.Linear(5, 1)),
    "BatchNorm that averages over all batches": lambda: nn.Sequential(
        nn.Linear(3, 5), nn.BatchNorm1d(5, momentum=None), nn.Tanh(), nn.Linear(5, 1)
    ),
    "weight norm": lambda: nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(3, 5)), nn.Tanh(), nn.Linear(5, 1)
    ),
}


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
def test_any_network_is_followed(fit, tmp_path, network):
    assert_finite_differences_agree(fit, tmp_path, sgd(momentum=0.5), network=network, max_epochs=2)


class Detached(Step):
    """Is drawn to what it says itself of other inputs, as in self-distillation: the gradient is that of no function."""

    def training_step(self, batch, batch_idx):
        inputs, targets, weights = batch
        own = self(inputs.flip(1)).detach()
        return (weights * (self.errors(inputs, targets) + 0.5 * (self(inputs) - own) ** 2)).mean()


def recorded(fit, root, make):
    train(fit, sgd(momentum=0.5), *weighted_data(), TrajectoryRecorder(root), make=make, max_epochs=5)
    data = TensorDataset(*weighted_data())
    return attribute(Ensemble.open(root), make(sgd()), data, queries=data, measurement=squared_error, progress=False)


class Turned(torch.autograd.Function):
    @staticmethod
    def forward(context, value):
        return value.clone()

    @staticmethod
    def backward(context, gradient):
        return -gradient


class Adversarial(Step):
    """Turns the gradient of a term around on its way to the first layer: it is that of no function."""

    def training_step(self, batch, batch_idx):
        inputs, targets, weights = batch
        hidden = torch.tanh(self.net[0](inputs))
        deceived = (self.net[2](Turned.apply(hidden)).squeeze(-1) - inputs[:, 0]) ** 2
        return (weights * (self.errors(inputs, targets) + 0.3 * deceived)).mean()


@pytest.mark.parametrize(("make", "is_followed"), [(Step, True), (Detached, False), (Adversarial, False)])
def test_what_autograd_does_not_follow_is_found_by_the_diagnosis(fit, tmp_path, make, is_followed):
    # to autograd, what is detached does not depend on the parameters, and a turned gradient is a derivative
    answer = recorded(fit, tmp_path, make)
    (diagnosis,) = answer.about["diagnosis"].values()
    if is_followed:
        assert diagnosis["finite_differences"] < 1e-6
    else:
        assert diagnosis["finite_differences"] > 0.05
