"""Losses of any kind are recorded, and what their examples share is known; trying a step leaves no trace."""

import logging

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, default_collate
from torchmetrics import MeanMetric

from lightning_dtda import Ensemble, TrajectoryRecorder, attribute
from lightning_dtda.errors import RecordingError, ReplayError
from tests.recording.modules import Classifier, IndexedExamples, Regressor, loader, parameters_of, shuffled

CLASS_WEIGHTS = torch.tensor([1.0, 3.0])


def weighted_cross_entropy(logits, labels):
    """Divides by the sum of the weights in the batch, so that an example's share depends on the others."""
    return functional.cross_entropy(logits, labels, weight=CLASS_WEIGHTS)


def contrastive(logits, labels):
    """Each example is to be more similar to itself than to the others of its batch."""
    return functional.cross_entropy(logits @ logits.T, torch.arange(len(logits)))


def summed(logits, labels):
    return functional.cross_entropy(logits, labels, reduction="sum")


class Logging(Regressor):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log_dict({"epoch": float(self.current_epoch), "step": float(self.trainer.global_step)})
        return loss


class WithMetric(Regressor):
    def __init__(self):
        super().__init__()
        self.mean = MeanMetric()

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.mean(loss)
        self.log("mean", self.mean, on_epoch=True)
        return {"loss": loss}


class Penalized(Regressor):
    def training_step(self, batch):
        return self.example_errors(batch).mean() + 0.1 * sum((p**2).sum() for p in self.parameters())


class Attending(nn.Module):
    """Each example is three tokens that look at each other."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(2, 1, batch_first=True)

    def forward(self, inputs):
        tokens = inputs.reshape(len(inputs), 3, 2)
        return self.attention(tokens, tokens, tokens, need_weights=False)[0].flatten(1)


class Noisy(Regressor):
    def training_step(self, batch, batch_idx):
        moved = batch["inputs"] + 0.1 * torch.randn_like(batch["inputs"])
        return self.example_errors({**batch, "inputs": moved}).mean() * (1 + np.random.rand())


class Mixing(Regressor):
    def training_step(self, batch, batch_idx):
        other = torch.randperm(len(batch["inputs"]))
        return self.example_errors({**batch, "inputs": 0.7 * batch["inputs"] + 0.3 * batch["inputs"][other]}).mean()


class Branching(Regressor):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss if loss.item() > 0 else 2 * loss


class Moving(Regressor):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        return {**batch, "inputs": batch["inputs"] * torch.rand(())}


class OneByOne(Regressor):
    """Takes batches that nobody could stack: lists of dictionaries with texts in them."""

    def training_step(self, batch, batch_idx):
        inputs = torch.stack([item["inputs"] for item in batch if item["name"].startswith("example")])
        return ((self.net(inputs)[:, 0] - 1) ** 2).mean()


class Named(IndexedExamples):
    def __getitem__(self, index):
        return {**super().__getitem__(index), "name": f"example {index}"}


class HalfUnused(Regressor):
    def __init__(self):
        super().__init__()
        self.unused = nn.Linear(2, 2)


def batch_norm(**arguments):
    return lambda: Classifier(functional.cross_entropy, nn.BatchNorm1d(6, **arguments))


def frozen_batch_norm():
    return Classifier(functional.cross_entropy, nn.BatchNorm1d(6).eval())


def with_layers(*make):
    return lambda: Classifier(functional.cross_entropy, *(layer() for layer in make))


def attributed(run, module, data=None, queries=None):
    ensemble = Ensemble.open(run.path.parent)
    return attribute(ensemble, module, data or IndexedExamples(), queries=queries or IndexedExamples(), progress=False)


ALONE = {"training": "none", "evaluation": "none", "reduction": "mean"}

# with what the examples of a batch share, and how the loss is made of theirs
RECORDED = {
    "a mean over examples": (Regressor, ALONE),
    "cross entropy": (Classifier, ALONE),
    "self.log": (Logging, ALONE),
    "torchmetrics": (WithMetric, ALONE),
    "LayerNorm": (with_layers(lambda: nn.LayerNorm(6)), ALONE),
    "dropout": (with_layers(lambda: nn.Dropout(0.5), lambda: nn.AlphaDropout(0.2)), ALONE),
    "attention": (with_layers(Attending), ALONE),
    "BatchNorm in evaluation mode": (frozen_batch_norm, ALONE),
    "BatchNorm": (batch_norm(), ALONE | {"training": "network"}),
    "BatchNorm that averages over everything": (batch_norm(momentum=None), ALONE | {"training": "network"}),
    "BatchNorm without running statistics": (
        batch_norm(track_running_stats=False),
        {"training": "network", "evaluation": "network", "reduction": "other"},
    ),
    "L2 penalty": (Penalized, ALONE),
    "a branch on the loss": (Branching, ALONE),
    "a parameter that is not used": (HalfUnused, ALONE),
    "a hook that changes batches": (Moving, ALONE),
    "a sum": (lambda: Classifier(summed), ALONE | {"reduction": "sum"}),
    "class weights": (
        lambda: Classifier(weighted_cross_entropy),
        {"training": "loss", "evaluation": "loss", "reduction": "other"},
    ),
    "contrastive": (
        lambda: Classifier(contrastive),
        {"training": "loss", "evaluation": "loss", "reduction": "other"},
    ),
    "noise in the step": (Noisy, {"training": "none", "evaluation": "none"}),
    "mixup": (Mixing, {"training": "network", "evaluation": "network"}),
}


@pytest.mark.parametrize(("make", "shared"), RECORDED.values(), ids=RECORDED)
def test_it_is_recorded_with_what_examples_share(record, make, shared):
    pl.seed_everything(0, verbose=False)

    run = record(make(), shuffled(), max_epochs=1)

    assert run.complete
    assert run.steps == 6
    assert {name: run.manifest.shared[name] for name in shared} == shared


@pytest.mark.parametrize("make", [Noisy, Moving, Branching, Mixing])
def test_its_replay_is_the_training(record, make):
    # each gradient is compared with the record, and the parameters at each checkpoint
    pl.seed_everything(0, verbose=False)
    run = record(make(), shuffled(), max_epochs=2)

    answer = attributed(run, make())

    assert answer.about["drift"]["run"]["gradients"] < 1e-6


def test_batches_may_be_anything(record):
    data = DataLoader(Named(), 4, shuffle=True, collate_fn=list)
    run = record(OneByOne(), data, max_epochs=1)

    answer = attributed(run, OneByOne(), data, DataLoader(Named(), collate_fn=list))

    assert answer.about["drift"]["run"]["gradients"] < 1e-6
    assert run.manifest.shared == ALONE


def test_what_is_not_used_is_said_and_not_recorded(record, caplog):
    with caplog.at_level(logging.INFO, logger="lightning_dtda"):
        run = record(HalfUnused(), shuffled(), max_epochs=1)

    assert not any(name.startswith("unused") for name in run.layout.names)
    assert "does not use the parameters unused.weight, unused.bias" in caplog.text


def test_buffers_that_are_not_followed_are_named(record, caplog):
    class Normalised(Classifier):
        def __init__(self):
            super().__init__()
            self.net[0] = nn.utils.parametrizations.spectral_norm(self.net[0])

    torch.manual_seed(0)  # from some starts, the power iteration has converged to the last bit before the first step
    run = record(Normalised(), shuffled(), max_epochs=1)

    assert run.complete
    assert "changes the buffers net.0.parametrizations.weight.0._u, net.0.parametrizations.weight.0._v" in caplog.text
    answer = attributed(run, Normalised())
    assert answer.about["drift"]["run"]["gradients"] < 1e-5


class Once(torch.autograd.Function):
    """Can be differentiated once."""

    @staticmethod
    def forward(context, value):
        context.save_for_backward(value)
        return value**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context, gradient):
        return 2 * context.saved_tensors[0] * gradient


class OnlyOnce(Regressor):
    def example_errors(self, batch):
        return Once.apply(self.net(batch["inputs"]).squeeze(-1) - batch["targets"])


class Learned(Regressor):
    def __init__(self):
        super().__init__()
        self.balance = nn.Parameter(torch.zeros(()))

    def training_step(self, batch, batch_idx):
        penalty = self.net(batch["inputs"]).square().mean()
        return super().training_step(batch, batch_idx) * self.balance.exp() + penalty * (-self.balance).exp()


class WithoutRows(Regressor):
    def training_step(self, batch, batch_idx):
        return (self.net(batch["inputs"].mean(0)) ** 2).sum()


class OneSize(Regressor):
    def training_step(self, batch, batch_idx):
        assert len(batch["index"]) == 4, "four at a time"
        return super().training_step(batch, batch_idx)


class Rooted(Regressor):
    """Has a loss whose second derivative is infinite where an output is zero."""

    def __init__(self):
        super().__init__()
        nn.init.zeros_(self.net[3].weight)
        nn.init.zeros_(self.net[3].bias)

    def training_step(self, batch, batch_idx):
        return (self.net(batch["inputs"]).abs() ** 1.5).mean()


class Elsewhere(Regressor):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * (1 + self.trainer.num_sanity_val_batches)


REFUSED = {
    "a derivative that has none": (OnlyOnce, "marked with @once_differentiable.*Use the same operation in plain torch"),
    "a learned weight of two losses": (Learned, "parameter balance cannot be divided among.*Freeze the parameter"),
    "no row for an example": (WithoutRows, "has a row for each example.*a number for each example"),
    "one size only": (OneSize, "(?s)four at a time.*batches of any size"),
    "an infinite second derivative": (Rooted, "second derivative .* is not finite.*Add a small number"),
    "what is not recorded": (Elsewhere, r"reads self\.trainer\.num_sanity_val_batches.*in the module or its batches"),
}


@pytest.mark.parametrize(("make", "remedy"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_replayed_is_refused_before_the_first_step_with_the_remedy(record, root, make, remedy):
    module = make()
    before = parameters_of(module)

    with pytest.raises(RecordingError, match=remedy):
        record(module, loader(), max_epochs=1)

    assert not (root / "run").exists()
    assert all(torch.equal(parameter, before[name]) for name, parameter in module.named_parameters())


def test_a_refused_loss_does_not_cost_the_run_that_was_to_be_overwritten(record, root):
    record(Regressor(), loader(), max_epochs=1)
    before = (root / "run" / "manifest.json").read_bytes()

    with pytest.raises(RecordingError):
        record(WithoutRows(), loader(), max_epochs=1, recorder={"overwrite": True})

    assert (root / "run" / "manifest.json").read_bytes() == before


class Note(pl.Callback):
    """Notes the module's state and the random states where the first batch is at hand, but not yet trained on."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 0:
            self.note = {
                "seen": pl_module.seen_indices,
                "attributes": sorted(vars(pl_module)),
                "modes": [layer.training for layer in pl_module.modules()],
                "tensors": [value.tolist() for value in pl_module.state_dict().values()],
                "metric": (pl_module.mean.update_count, pl_module.mean.mean_value.item(), pl_module.mean._computed),
                "random states": (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()),
                "batch": [value.tolist() for value in batch.values()],
            }


class Everything(WithMetric):
    """Leaves traces wherever it can."""

    def training_step(self, batch, batch_idx):
        self.net[0].bias.data.add_(0.0)
        self.steps_taken = getattr(self, "steps_taken", 0) + 1
        np.random.rand()
        torch.rand(1)
        return super().training_step(batch, batch_idx)


def test_trying_a_step_leaves_no_trace(fit, root):
    module, before, after = Everything(), Note(), Note()

    fit(module, shuffled(), before, TrajectoryRecorder(root, "run"), after, max_epochs=1)

    assert after.note == before.note
    assert module.steps_taken == len(module.seen) == 6


def test_the_training_is_the_same_to_the_bit(fit, root):
    def make():
        pl.seed_everything(5, verbose=False)
        return Noisy()

    alone, recorded = make(), None
    fit(alone, shuffled(), max_epochs=2)
    recorded = make()
    fit(recorded, shuffled(), TrajectoryRecorder(root, "run"), max_epochs=2)

    for name, parameter in alone.named_parameters():
        assert torch.equal(parameter, recorded.get_parameter(name))


def test_a_last_batch_of_one_is_followed(record):
    # 23 examples make a batch of one; a network with BatchNorm refuses that itself, in training as in a replay
    pl.seed_everything(0, verbose=False)
    run = record(Classifier(weighted_cross_entropy), shuffled(batch_size=11), max_epochs=2)

    answer = attributed(run, Classifier(weighted_cross_entropy))

    assert [len(run.batch_indices(step)) for step in range(3)] == [11, 11, 1]
    assert answer.about["drift"]["run"]["gradients"] < 1e-6


def test_examples_that_the_collate_fn_leaves_out_later_are_distinguished(record):
    # of the batch that lacks one, no tensor has four rows
    def dropping(items):
        return default_collate([item for item in items if item["index"] != 22] or items)

    run = record(Regressor(), loader(collate_fn=dropping), max_epochs=1)

    with pytest.raises(ReplayError, match="the collate_fn leaves examples out"):
        attributed(run, Regressor(), loader(collate_fn=dropping))
