"""On the first batch, the mean of the per-example losses has to be the loss that is trained on."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from lightning_dtda import TrajectoryRecorder
from lightning_dtda.errors import RecordingError
from tests.recording.modules import Classifier, IndexedExamples, Regressor, loader, parameters_of, shuffled

CLASS_WEIGHTS = torch.tensor([1.0, 3.0])


def weighted_cross_entropy(logits, labels):
    """Divides by the sum of the weights in the batch, so that an example's share depends on the others."""
    return functional.cross_entropy(logits, labels, weight=CLASS_WEIGHTS)


def contrastive(logits, labels):
    """Each example is to be more similar to itself than to the others of its batch."""
    return functional.cross_entropy(logits @ logits.T, torch.arange(len(logits)))


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


class FrozenBatchNorm(Classifier):
    def __init__(self):
        super().__init__(functional.cross_entropy, nn.BatchNorm1d(6).eval())


class WeightedWithItsOwn(Classifier):
    def __init__(self):
        super().__init__(weighted_cross_entropy)

    def example_losses(self, batch):
        labels = batch["index"] % 2
        losses = functional.cross_entropy(self.net(batch["inputs"]), labels, weight=CLASS_WEIGHTS, reduction="none")
        return losses * len(labels) / CLASS_WEIGHTS[labels].sum()


class Attending(nn.Module):
    """Each example is three tokens that look at each other."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(2, 1, batch_first=True)

    def forward(self, inputs):
        tokens = inputs.reshape(len(inputs), 3, 2)
        return self.attention(tokens, tokens, tokens, need_weights=False)[0].flatten(1)


ACCEPTED = {
    "a mean over examples": Regressor,
    "cross entropy": Classifier,
    "self.log": Logging,
    "torchmetrics": WithMetric,
    "LayerNorm": lambda: Classifier(functional.cross_entropy, nn.LayerNorm(6)),
    "dropout": lambda: Classifier(functional.cross_entropy, nn.Dropout(0.5), nn.AlphaDropout(0.2)),
    "attention": lambda: Classifier(functional.cross_entropy, Attending()),
    "BatchNorm in evaluation mode": FrozenBatchNorm,
    "L2 penalty": Penalized,
    "class weights with losses of its own": WeightedWithItsOwn,
}


@pytest.mark.parametrize("make", ACCEPTED.values(), ids=ACCEPTED)
def test_losses_that_are_means_over_examples_are_recorded(record, make):
    run = record(make(), shuffled(), max_epochs=1)

    assert run.complete
    assert run.steps == 6


class WithoutAMean(Regressor):
    def training_step(self, batch, batch_idx):
        return self.example_errors(batch).sum()


class Disagreeing(Regressor):
    def example_losses(self, batch):
        return 1.01 * self.example_errors(batch)


class ScalarLosses(Regressor):
    def example_losses(self, batch):
        return self.example_errors(batch).mean()


class RightValueWrongSlope(Regressor):
    """Equals the mean, but is differentiated as the sum."""

    def training_step(self, batch, batch_idx):
        errors = self.example_errors(batch)
        return errors.sum() - errors.sum().detach() + errors.mean().detach()


class Noisy(Regressor):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + torch.randn(()) * self.net[0].weight.sum()


class Branching(Regressor):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss if loss.item() > 0 else 2 * loss


class LossesOfPairs(Regressor):
    def example_losses(self, batch):
        return self.example_errors(batch).reshape(-1, 2).mean(1)


class OneAtATimeFails(Regressor):
    def training_step(self, batch, batch_idx):
        assert len(batch["index"]) > 1, "a batch of one"
        return super().training_step(batch, batch_idx)


REFUSED = {
    "a sum": (WithoutAMean, "value .* against .*example_losses"),
    "class weights": (lambda: Classifier(weighted_cross_entropy), "value .* against .*example_losses"),
    "contrastive": (lambda: Classifier(contrastive), "value .* against .*example_losses"),
    "example_losses of another loss": (Disagreeing, "value .* against .*Disagreeing.example_losses"),
    "example_losses of the wrong shape": (ScalarLosses, r"example_losses must return a tensor of shape \(B,\)"),
    "right in value only": (RightValueWrongSlope, "slope .* against .*example_losses"),
    "random beyond dropout": (Noisy, "other than those of .*dropout"),
    "a branch on the loss": (Branching, "example_losses"),
    "fewer losses than examples": (LossesOfPairs, "2 per-example losses for the 4 examples"),
    "a training_step that fails on one example": (OneAtATimeFails, "a batch of one.*define example_losses"),
}


@pytest.mark.parametrize(("make", "remedy"), REFUSED.values(), ids=REFUSED)
def test_other_losses_are_refused_before_the_first_step_with_the_remedy(record, root, make, remedy):
    module = make()
    before = parameters_of(module)

    with pytest.raises(RecordingError, match=remedy):
        record(module, loader(), max_epochs=1)  # in order: a batch of one class has no class weights

    assert not (root / "run").exists()
    assert all(torch.equal(parameter, before[name]) for name, parameter in module.named_parameters())


def test_batches_that_are_no_tensors_are_refused_though_example_losses_could_take_them(fit, root):
    class Named(Regressor):
        def example_losses(self, batch):
            return self.example_errors(batch)

    data = [{**item, "name": str(item["index"])} for item in map(IndexedExamples().__getitem__, range(8))]
    with pytest.raises(RecordingError, match="this one holds str"):
        fit(Named(), DataLoader(data, batch_size=4), TrajectoryRecorder(root, "run"), max_epochs=1)


def test_a_refused_loss_does_not_cost_the_run_that_was_to_be_overwritten(fit, record, root):
    record(Regressor(), loader(), max_epochs=1)
    before = (root / "run" / "manifest.json").read_bytes()

    with pytest.raises(RecordingError):
        record(WithoutAMean(), loader(), max_epochs=1, recorder={"overwrite": True})

    assert (root / "run" / "manifest.json").read_bytes() == before


class Centred(Regressor):
    """Subtracts from its losses their mean on the first batch, so that they cancel to rounding there.

    Args:
        batch: The first batch.
    """

    def __init__(self, batch):
        super().__init__()
        self.shift = self.example_errors(batch).mean().item()

    def training_step(self, batch, batch_idx):
        return 1000 * (self.example_errors(batch) - self.shift).mean()


def test_a_loss_that_cancels_to_rounding_is_not_mistaken_for_another(record):
    data = loader()

    run = record(Centred(next(iter(data))), data, max_steps=1)

    assert run.complete


def test_a_slope_that_cancels_to_rounding_is_not_mistaken_for_another(record, monkeypatch):
    data = loader()
    module = Centred(next(iter(data)))
    module.training_step(next(iter(data)), 0).backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in module.parameters()])
    random = torch.randn(len(gradient))
    orthogonal = random - (random @ gradient) / (gradient @ gradient) * gradient
    monkeypatch.setattr(torch, "randn_like", lambda theta: orthogonal)

    run = record(module, data, max_steps=1)

    assert run.complete


class Note(pl.Callback):
    """Notes the module's Python state and the random state where the first batch is at hand, but not yet trained on."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 0:
            self.note = {
                "seen": pl_module.seen_indices,
                "attributes": sorted(vars(pl_module)),
                "modes": [layer.training for layer in pl_module.modules()],
                "tensors": [value.tolist() for value in pl_module.state_dict().values()],
                "metric": (pl_module.mean.update_count, pl_module.mean.mean_value.item(), pl_module.mean._computed),
                "random state": torch.get_rng_state().tolist(),
            }


class Everything(WithMetric):
    """Leaves traces wherever it can."""

    def training_step(self, batch, batch_idx):
        self.net[0].bias.data.add_(0.0)
        self.steps_taken = getattr(self, "steps_taken", 0) + 1
        return super().training_step(batch, batch_idx)


def test_the_check_leaves_no_trace_in_the_module(fit, root):
    module, before, after = Everything(), Note(), Note()

    fit(module, shuffled(), before, TrajectoryRecorder(root, "run"), after, max_epochs=1)

    assert after.note == before.note
    assert module.steps_taken == len(module.seen) == 6
