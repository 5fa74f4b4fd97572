"""A module as it was in training: it finds what it found then, and neither it nor the user's keeps anything of a
pass."""

import copy
import threading

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torchmetrics
from torch import nn
from torch.nn import functional

from lightning_dtda.errors import ReplayError
from lightning_dtda.replay.replica import Replica
from lightning_dtda.replay.stand_ins import Circumstances, Time
from lightning_dtda.trajectory import ParameterLayout
from tests.replay.steps import CPU, Step, layout_of, normal

B, F = 6, 3
ITEMS = list(zip(normal(B, F), torch.arange(B) % 2, strict=True))


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(F, 2).double()

    def forward(self, inputs):
        return self.layer(inputs)

    def training_step(self, batch, batch_idx):
        return functional.cross_entropy(self(batch[0]), batch[1])


def loss_of(step, batch=None):
    """The value of the step's loss."""
    with step.replica.generators.kept(), step.replica.passing():
        step.replica.load(step.theta, step.buffers)
        batch = step.collate(step.items) if batch is None else batch
        return step.replica.training_loss(batch, step.time, step.states).item()


class Logging(Classifier):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss, prog_bar=True, on_epoch=True)
        self.log_dict({"epoch": float(self.current_epoch), "step": float(self.trainer.global_step)})
        self.logger.log_metrics({"loss": 0.0})
        self.print("a line")
        self.trainer.progress_bar_metrics["loss"] = 0.0
        return {"loss": loss, "outputs": self(batch[0])}


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
        return functional.cross_entropy(scores, batch[1])


class WithoutIndex(Classifier):
    def training_step(self, batch):
        return functional.cross_entropy(self(batch[0]), batch[1])


@pytest.mark.parametrize("kind", [Logging, Measuring, WithoutIndex])
def test_steps_that_log_and_measure_have_the_loss_and_gradient_that_they_have(kind):
    step, plain = Step(kind(), ITEMS), Step(Classifier(), ITEMS)
    assert loss_of(step) == loss_of(plain)
    assert torch.equal(step.gradient(), plain.gradient())
    weights = normal(B)
    assert torch.equal(step.gradient(weights), plain.gradient(weights))


class MetricLoss(Classifier):
    """Trains on what a metric returns."""

    def __init__(self):
        super().__init__()
        self.error = torchmetrics.MeanSquaredError()

    def training_step(self, batch, batch_idx):
        return self.error(self(batch[0])[:, 0], batch[1].double())


def test_a_metric_may_be_the_loss_and_remembers_nothing():
    step = Step(MetricLoss(), ITEMS)
    module = step.replica.module
    expected = functional.mse_loss(module(step.collate(ITEMS)[0])[:, 0], step.collate(ITEMS)[1].double())
    gradient = step.layout.flatten(torch.autograd.grad(expected, step.replica.parameters))
    for _ in range(2):  # torchmetrics sums up in single precision
        assert loss_of(step) == pytest.approx(float(expected.detach()), rel=1e-6)
        torch.testing.assert_close(step.gradient(), gradient, rtol=1e-6, atol=1e-7)
        assert module.error.update_count == 0
        assert float(module.error.total) == 0


class Remembering(Classifier):
    """Leaves traces wherever it can."""

    def __init__(self):
        super().__init__()
        self.seen, self.losses, self.names, self.steps_taken, self.last = [], {"first": 1}, {"a"}, 0, None
        self.noise = torch.Generator().manual_seed(7)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.seen.append(loss)
        self.losses["last"] = loss
        self.names.add("b")
        self.steps_taken += 1
        self.last = loss
        self.layer.met = self.found = batch
        return loss + 0 * torch.rand((), generator=self.noise)


def remembered(module):
    kept = (module.seen, module.losses, module.names, module.steps_taken, module.last)
    return copy.copy(kept), sorted(vars(module)), sorted(vars(module.layer))


def test_a_module_knows_after_a_pass_what_it_knew_before():
    step = Step(Remembering(), ITEMS)
    module = step.replica.module
    module.seen.append("of the training")
    lists = module.seen, module.losses
    fresh = Step(Remembering(), ITEMS)  # takes what it is made with for what is known
    before = remembered(fresh.replica.module)
    for training in (True, False):
        with fresh.passed(training=training):
            pass
        assert remembered(fresh.replica.module) == before
    assert fresh.replica.module.seen == []
    step.gradient()
    assert (module.seen, module.losses) == ([], {"first": 1})
    assert module.seen is lists[0]  # the same objects: others may hold them


def test_the_users_module_is_left_alone():
    module = Remembering().eval()
    module.layer.bias.requires_grad_(False)
    before = remembered(module)
    weights, state = copy.deepcopy(module.state_dict()), module.noise.get_state()
    step = Step(module, ITEMS)
    step.theta += 1
    step.products(normal(len(step.theta)))
    assert remembered(module) == before
    assert torch.equal(module.noise.get_state(), state)
    assert all(torch.equal(value, weights[name]) for name, value in module.state_dict().items())
    assert module._trainer is None
    assert not module.training
    assert module.layer.weight.grad is None
    assert not module.layer.bias.requires_grad


class Annealed(Classifier):
    """Looks at all that a step can see of the training."""

    def training_step(self, batch, batch_idx):
        progress = (
            self.current_epoch / self.trainer.max_epochs + self.global_step / self.trainer.estimated_stepping_batches
        )
        rate = self.optimizers().param_groups[0]["lr"]
        assert rate == self.trainer.optimizers[0].param_groups[0]["lr"] == self.lr_schedulers().get_last_lr()[0]
        return super().training_step(batch, batch_idx) * (1 + progress + 10 * rate + 100 * batch_idx)


def test_the_recorded_clock_and_rate_are_seen_by_the_step():
    facts = {"trainer": {"max_epochs": 4, "estimated_stepping_batches": 20}}
    time = Time(epoch=2, step=5, batch_idx=3, hyperparameters=[{"lr": 0.5}])
    step, plain = Step(Annealed(), ITEMS, time=time, circumstances=facts), Step(Classifier(), ITEMS)
    factor = 1 + 2 / 4 + 5 / 20 + 10 * 0.5 + 100 * 3
    assert loss_of(step) == pytest.approx(factor * loss_of(plain), rel=1e-14)
    torch.testing.assert_close(step.gradient(), factor * plain.gradient(), rtol=1e-13, atol=0)


def reading(read):
    class Reading(Classifier):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * read(self)

    return Reading()


UNKNOWN = {
    "of the Trainer": (lambda module: module.trainer.num_sanity_val_batches, r"self\.trainer\.num_sanity_val_batches"),
    "of the optimizer": (lambda module: len(module.optimizers().state), "uses state of its optimizer"),
    "of the scheduler": (
        lambda module: module.lr_schedulers().last_epoch,
        "uses last_epoch of its optimizer or scheduler",
    ),
}


@pytest.mark.parametrize(("read", "message"), UNKNOWN.values(), ids=UNKNOWN)
def test_what_is_not_recorded_is_named(read, message):
    with pytest.raises(ReplayError, match=message):
        loss_of(Step(reading(read), ITEMS))


class Augmenting(Classifier):
    """Augments batches on their way, by all kinds of random numbers."""

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return [batch[0] * np.random.rand(), batch[1]]

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return [batch[0] + torch.randn_like(batch[0]), batch[1]] if self.trainer.training else batch


def test_hooks_on_a_batchs_way_draw_what_they_drew():
    torch.manual_seed(3)
    np.random.seed(3)
    step = Step(Augmenting(), ITEMS, circumstances={"transfer_hooks": {"on_after_batch_transfer": "module"}})
    inputs, labels = step.collate(ITEMS)
    moved = inputs * np.random.rand() + torch.randn_like(inputs)
    expected = functional.cross_entropy(step.replica.module(moved), labels)
    torch.manual_seed(99)  # whatever was drawn since
    np.random.seed(99)
    for _ in range(2):
        assert loss_of(step) == pytest.approx(float(expected.detach()), rel=1e-14)
    with step.passed() as one:
        assert float(one.loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-14)


class Shifting(pl.LightningDataModule):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        return [batch[0] + 1, batch[1]]


def test_a_data_modules_own_hook_counts_before_the_modules():
    facts = {"transfer_hooks": {"on_after_batch_transfer": "datamodule"}}
    step = Step(Classifier(), ITEMS, circumstances=facts, datamodule=Shifting())
    plain = Step(Classifier(), [(inputs + 1, label) for inputs, label in ITEMS])
    assert loss_of(step) == loss_of(plain)
    with pytest.raises(ReplayError, match="Give that data module as data"):
        Step(Classifier(), ITEMS, circumstances=facts)


class Normalised(Classifier):
    def __init__(self):
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(F).double(), nn.Dropout(0.5)

    def forward(self, inputs):
        return self.layer(self.drop(self.norm(inputs)))


def test_submodules_are_in_the_modes_in_which_they_were():
    step = Step(Normalised(), ITEMS, circumstances={"evaluation_modules": ["norm"]})
    module = step.replica.module
    assert (module.training, module.norm.training, module.drop.training) == (True, False, True)
    with step.replica.passing(training=False):
        assert not any(layer.training for layer in module.modules())
    assert (module.training, module.norm.training, module.drop.training) == (True, False, True)
    step.gradient()
    assert torch.equal(step.replica.buffers(["norm.running_mean"])["norm.running_mean"], torch.zeros(F).double())


def test_a_training_in_single_precision_is_replayed_in_double_on_request():
    class Making(Classifier):
        """Makes tensors of its own, as modules do, and says what it computes in."""

        def __init__(self):
            super().__init__()
            self.layer.float()
            self.register_buffer("scale", torch.tensor(2.0))

        def training_step(self, batch, batch_idx):
            dtypes.append((batch["inputs"].dtype, batch["labels"].dtype, torch.ones(1).dtype, self.scale.dtype))
            noise = torch.randn(batch["inputs"].shape)
            return functional.cross_entropy(self(batch["inputs"] * self.scale + noise), batch["labels"])

    dtypes = []
    items = [{"inputs": inputs.float(), "labels": label} for inputs, label in ITEMS]
    single = Step(Making(), items)
    double = Step(Making(), items, dtype=torch.float64, recorded_dtype=torch.float32, states=single.states)
    gradients = [step.gradient() for step in (single, double)]
    assert set(dtypes) == {
        (torch.float32, torch.int64, torch.float32, torch.float32),
        (torch.float64, torch.int64, torch.float64, torch.float64),
    }
    assert torch.get_default_dtype() == torch.float32
    assert gradients[1].dtype == torch.float64
    torch.testing.assert_close(gradients[0].double(), gradients[1], rtol=1e-5, atol=1e-6)


def test_mixed_precision_is_that_of_the_training():
    class Noting(Classifier):
        def training_step(self, batch, batch_idx):
            outputs = self(batch[0])
            dtypes.append(outputs.dtype)
            return functional.cross_entropy(outputs, batch[1])

    dtypes = []
    items = [(inputs.float(), label) for inputs, label in ITEMS]
    module = Noting()
    module.layer.float()
    mixed, plain = (Step(module, items, circumstances={"precision": name}) for name in ("bf16-mixed", "32-true"))
    difference = mixed.gradient() - plain.gradient()
    assert set(dtypes) == {torch.bfloat16, torch.float32}
    assert 0 < difference.norm() < 0.05 * plain.gradient().norm()


class Tied(Classifier):
    """One weight under two names, and a frozen layer."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.Linear(2, F, bias=False).double().requires_grad_(False)
        self.again = nn.Linear(F, 2, bias=False).double()
        self.again.weight = self.layer.weight

    def forward(self, inputs):
        return self.again(self.frozen(self.layer(inputs)))


def test_tied_weights_and_frozen_ones_are_put_in():
    module = Tied()
    step = Step(module, ITEMS)
    assert step.names == ["layer.weight", "layer.bias"]
    step.theta, frozen = normal(len(step.theta)), normal(F, 2, seed=4)
    step.buffers["frozen.weight"] = frozen
    inputs, labels = step.collate(ITEMS)
    weight, bias = step.split(step.theta)
    expected = functional.cross_entropy(((inputs @ weight.T + bias) @ frozen.T) @ weight.T, labels)
    assert loss_of(step) == pytest.approx(float(expected), rel=1e-13)

    # tensors in place of the parameters, as a trace has them
    weight, bias = (part.clone().requires_grad_() for part in (weight, bias))
    with step.replica.passing(), step.replica.swapped([weight, bias], {"frozen.weight": frozen}):
        found = step.replica.training_loss([inputs, labels], step.time)
    again = functional.cross_entropy(((inputs @ weight.T + bias) @ frozen.T) @ weight.T, labels)
    for one, other in zip(*(torch.autograd.grad(loss, [weight, bias]) for loss in (found, again)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
    assert step.replica.module.again.weight is step.replica.module.layer.weight is step.replica.parameters[0]


def test_parameters_lie_in_memory_as_they_are_trained():
    module = Classifier()
    module.layer = nn.Sequential(
        nn.Unflatten(1, (F, 1, 1)), nn.Conv2d(F, 4, 2, padding=1), nn.Flatten(), nn.LazyLinear(2)
    )
    module = module.double()
    module(torch.zeros(1, F, dtype=torch.float64))
    module = module.to(memory_format=torch.channels_last)
    step = Step(module, ITEMS)
    step.theta = normal(len(step.theta))
    step.replica.load(step.theta, step.buffers)
    weight = step.replica.module.layer[1].weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()
    torch.testing.assert_close(weight.flatten(), step.theta[: weight.numel()], rtol=0, atol=0)


class Counting(Classifier):
    """Changes a buffer in place."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def training_step(self, batch, batch_idx):
        self.count += 1
        return super().training_step(batch, batch_idx)


def test_buffers_after_a_pass_are_those_of_this_pass_though_others_were_tried_for_its_graph():
    step = Step(Counting(), ITEMS)
    step.buffers["count"] = torch.tensor(7.0)
    for _ in range(2):  # the graph is learned the first time, by leaving examples out
        step.gradient()
        assert float(step.replica.buffers(["count"])["count"]) == 8
        assert float(step.buffers["count"]) == 7


def test_what_has_no_copy_is_said():
    class Locked(Classifier):
        def __init__(self):
            super().__init__()
            self.lock = threading.Lock()

    with pytest.raises(ReplayError, match="Locked cannot be copied"):
        Step(Locked(), ITEMS)


def test_a_tensor_with_a_history_does_not_stand_in_the_way_of_a_copy():
    module = Classifier()
    module.last = {"loss": module(normal(2, F)).sum()}
    assert loss_of(Step(module, ITEMS)) == loss_of(Step(Classifier(), ITEMS))


@pytest.mark.parametrize("returned", [None, torch.ones(2), 3.0, {"losses": 1}], ids=str)
def test_what_is_no_loss_is_refused(returned):
    class Odd(Classifier):
        def training_step(self, batch, batch_idx):
            return returned

    with pytest.raises(ReplayError, match=r"Odd\.training_step returned .*must return the loss"):
        loss_of(Step(Odd(), ITEMS))


def test_another_architecture_is_refused_naming_the_parameter():
    def replica(names, shapes):
        return Replica(Classifier(), ParameterLayout(names, shapes, (len(names),)), Circumstances(), torch.float64, CPU)

    with pytest.raises(ReplayError, match=r"layer\.weight has shape \(2, 3\)"):
        replica(("layer.weight", "layer.bias"), ((2, 4), (2,)))
    with pytest.raises(ReplayError, match=r"parameter head\.weight"):
        replica(("head.weight",), ((2, 3),))
    assert layout_of(Classifier()) == replica(("layer.weight", "layer.bias"), ((2, 3), (2,))).layout
