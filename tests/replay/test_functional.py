"""Ordinary training_steps as pure functions: logging, metrics and trainers must not get in the way."""

import lightning.pytorch as pl
import pytest
import torch
import torchmetrics

from lightning_dtda.errors import ReplayError
from lightning_dtda.replay import FunctionalModule
from lightning_dtda.trajectory import ParameterLayout

BATCH = [torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 2]


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 2)

    def forward(self, inputs):
        return self.layer(inputs)

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])


class Logging(Classifier):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss, prog_bar=True)
        self.log_dict({"epoch": float(self.current_epoch), "step": float(self.trainer.global_step)})
        self.logger.log_metrics({"loss": 0.0})
        return {"loss": loss}


class Measuring(Classifier):
    def __init__(self):
        super().__init__()
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(2)
        self.metrics = torchmetrics.MetricCollection([torchmetrics.classification.MulticlassF1Score(2)])

    def training_step(self, batch, batch_idx):
        scores = self(batch[0])
        self.log("accuracy", self.accuracy(scores, batch[1]))
        self.metrics.update(scores, batch[1])
        self.log_dict(self.metrics.compute())
        return torch.nn.functional.cross_entropy(scores, batch[1])


class WithoutIndex(Classifier):
    def training_step(self, batch):
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])


class OwnLosses(Classifier):
    def training_step(self, batch, batch_idx):
        return self.example_losses(batch).mean().item()  # cannot be mapped, and need not be

    def example_losses(self, batch):
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1], reduction="none")


def pure(module):
    layout = ParameterLayout(("layer.weight", "layer.bias"), ((2, 3), (2,)), (2,))
    return FunctionalModule(module, layout), layout.flatten(module.layer.parameters())


@pytest.mark.parametrize("kind", [Classifier, Logging, Measuring, WithoutIndex, OwnLosses])
def test_losses_and_gradients_are_those_of_each_example_alone(kind):
    module = kind()
    function, theta = pure(module)
    losses = function.example_losses(theta, {}, BATCH)
    expected = torch.nn.functional.cross_entropy(module(BATCH[0]), BATCH[1], reduction="none")
    torch.testing.assert_close(losses, expected)
    gradients = torch.func.jacrev(lambda point: function.example_losses(point, {}, BATCH))(theta)
    for row, loss in zip(gradients, expected, strict=True):
        own = torch.autograd.grad(loss, module.layer.parameters(), retain_graph=True)
        torch.testing.assert_close(row, torch.cat([part.flatten() for part in own]))


def test_stacked_parameters_are_mapped():
    function, theta = pure(Measuring())
    stacked = torch.stack([theta, 2 * theta])
    losses = torch.vmap(lambda point: function.example_losses(point, {}, BATCH))(stacked)
    torch.testing.assert_close(losses[1], function.example_losses(2 * theta, {}, BATCH))


def test_the_users_module_is_left_alone():
    module = Measuring()
    function, theta = pure(module)
    function.example_losses(theta + 1, {}, BATCH)
    assert module.accuracy._update_count == 0
    assert torch.equal(theta, torch.cat([parameter.flatten() for parameter in module.layer.parameters()]))
    assert module._trainer is None


def test_the_recorded_clock_is_seen_by_the_step():
    class Annealed(Classifier):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (self.current_epoch + 10 * self.global_step)

    function, theta = pure(Annealed())
    function.set_clock(current_epoch=2, global_step=7)
    plain, _ = pure(Classifier())
    torch.testing.assert_close(function.example_losses(theta, {}, BATCH), 72 * plain.example_losses(theta, {}, BATCH))


def test_what_a_replay_does_not_have_is_named():
    class Dependent(Classifier):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * self.trainer.num_training_batches

    function, theta = pure(Dependent())
    with pytest.raises(ReplayError, match=r"self\.trainer\.num_training_batches"):
        function.example_losses(theta, {}, BATCH)


def test_a_step_that_cannot_be_mapped_is_refused_with_the_remedy():
    class Branching(Classifier):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss if loss.item() < 100 else 0 * loss

    function, theta = pure(Branching())
    with pytest.raises(ReplayError, match=r"Leave out what needs numbers.*define example_losses"):
        function.example_losses(theta, {}, BATCH)


def test_another_architecture_is_refused_naming_the_parameter():
    layout = ParameterLayout(("layer.weight", "layer.bias"), ((2, 4), (2,)), (2,))
    with pytest.raises(ReplayError, match=r"layer\.weight has shape \(2, 3\)"):
        FunctionalModule(Classifier(), layout)
    with pytest.raises(ReplayError, match=r"parameter head\.weight"):
        FunctionalModule(Classifier(), ParameterLayout(("head.weight",), ((2, 3),), (1,)))
