"""Stacked trainings: the same as the Trainer's on the same seeds, or refused."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from torch.utils.data import DataLoader, RandomSampler, TensorDataset
from torchmetrics.classification import BinaryAccuracy

from lightning_dtda import retrain
from lightning_dtda.errors import CannotStackError
from lightning_dtda.retraining import random_subsets
from lightning_dtda.stacking.training import StackedTraining
from tests.regression import weighted_data
from tests.retraining.tasks import (
    BATCH,
    EXAMPLES,
    STEPS,
    Data,
    Regressor,
    by_hand,
    examples,
    make_trainer,
    queries,
    training_loader,
)
from tests.stacking.modules import (
    SETTINGS,
    Branching,
    Clocked,
    Counting,
    Dropping,
    Lucky,
    Noise,
    Normalised,
    Partly,
    Plateau,
    Reset,
    Single,
    Validating,
)

SUBSETS = [[2, 11], [5, 0], [5]]
SEEDS = [3, 4, 9]


def retrained(module=Regressor, data=None, stacked=True, trainer=make_trainer, **arguments):
    data = training_loader() if data is None else data
    defaults = {"subsets": SUBSETS, "seeds": SEEDS, "queries": queries()}
    return retrain(module, data, stacked=stacked, trainer=trainer, **(defaults | arguments), progress=False)


def assert_both_agree(**arguments):
    stacked, trained = retrained(**arguments), retrained(stacked=False, **arguments)
    assert (stacked.about["engine"], trained.about["engine"]) == ("stacked", "trainer")
    # double precision, some tens of smooth steps: rounding, from sums in another order
    torch.testing.assert_close(stacked.measurements, trained.measurements, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(stacked.baseline, trained.baseline, rtol=1e-10, atol=1e-12)
    # and seeds differ by far more
    assert stacked.measurements.std(1).min() > 1e-4


class Adaptive(Regressor):
    """AdamW with two parameter groups."""

    def configure_optimizers(self):
        groups = [{"params": self.net[0].parameters(), "lr": 0.01}, {"params": self.net[2].parameters()}]
        return torch.optim.AdamW(groups, lr=0.05, weight_decay=0.1)


class Annealed(Regressor):
    """Depends on the step by less than what stacks may differ by from the Trainer."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * (1 + 1e-7 * torch.tensor(self.global_step))


class Late(Regressor):
    """Depends on the step at one that is neither among the first, nor in the middle, nor the last."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * (1 + 1e-4 * (self.global_step == 5))


class Measuring(Regressor):
    """Updates a metric, which looks at values, and remembers its losses."""

    def __init__(self):
        super().__init__()
        self.accuracy = BinaryAccuracy()
        self.losses = []

    def training_step(self, batch, batch_idx):
        self.accuracy(self(batch[0]).sigmoid(), batch[1] > 0)
        self.losses.append(super().training_step(batch, batch_idx))
        return self.losses[-1]


class Cutting(Regressor):
    """Uses the first features only, however many there are."""

    def forward(self, inputs):
        return super().forward(inputs[:, :3])


class Transferring(Data):
    """Changes batches on their way to the device."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return 2 * batch[0], batch[1]


def reversed_examples(items):
    inputs, targets = zip(*reversed(items), strict=True)
    return torch.stack(inputs), torch.stack(targets)


@pytest.mark.slow
@pytest.mark.parametrize("module", [Regressor, Adaptive, Clocked, Annealed, Late, Partly, Measuring])
def test_stacks_and_the_trainer_agree_on_the_same_seeds(module):
    assert_both_agree(module=module)


@pytest.mark.slow
@pytest.mark.parametrize("dropping", [True, False])
@pytest.mark.parametrize("shuffle", [True, False])
def test_stacks_and_the_trainer_agree_on_batches_of_different_sizes(dropping, shuffle):
    assert_both_agree(data=training_loader(batch_size=5, drop_last=dropping, shuffle=shuffle))


@pytest.mark.slow
@pytest.mark.parametrize("arguments", SETTINGS)
def test_stacks_and_the_trainer_agree_on_clipping_accumulation_and_parts_of_epochs(arguments):
    assert_both_agree(trainer=lambda: make_trainer(**arguments))


@pytest.mark.slow
def test_stacks_and_the_trainer_agree_on_a_module_that_the_trainer_casts_to_double_precision():
    assert_both_agree(module=Single, trainer=lambda: make_trainer(precision="64-true"))


@pytest.mark.slow
def test_stacks_and_the_trainer_agree_where_validation_draws_random_numbers_in_between():
    assert_both_agree(data=Validating(), trainer=lambda: make_trainer(num_sanity_val_steps=1))


@pytest.mark.slow
def test_stacks_and_the_trainer_agree_where_the_data_module_changes_batches_and_a_collate_fn_makes_them():
    assert_both_agree(data=Transferring())
    assert_both_agree(data=training_loader(collate_fn=reversed_examples))


def test_batches_of_other_shapes_in_other_trainings_are_refused():
    def padded(items):  # by the value of an example
        inputs, targets = reversed_examples(items)
        return torch.nn.functional.pad(inputs, (0, int(targets[0] > 0))), targets

    with pytest.raises(CannotStackError, match="batches do not contain tensors of the same shapes in all trainings"):
        retrained(Cutting, data=training_loader(collate_fn=padded))


@pytest.mark.slow
@pytest.mark.parametrize("dropping", [True, False])
def test_stacks_and_the_trainer_agree_on_a_loader_with_a_generator_of_its_own(dropping):
    def loader():
        inputs, targets, _ = weighted_data(90)  # many: the sampler draws once more at the end of an epoch, for them all
        own = torch.Generator().manual_seed(5)
        return DataLoader(TensorDataset(inputs, targets), 25, shuffle=True, drop_last=dropping, generator=own)

    truth, trained = retrained(data=loader()), retrained(data=loader(), stacked=False)
    torch.testing.assert_close(truth.measurements, trained.measurements, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [{"replacement": True}, {"num_samples": 7}, {"num_samples": 30}])
def test_stacks_and_the_trainer_agree_on_samplers_that_are_no_permutation(arguments):
    dataset = examples()
    assert_both_agree(data=DataLoader(dataset, BATCH, sampler=RandomSampler(dataset, **arguments)))


def test_stacks_are_a_plain_loop_over_the_smaller_data_set():
    truth = retrained()
    for k, removed in enumerate(SUBSETS):
        for s, seed in enumerate(SEEDS):
            torch.testing.assert_close(truth.measurements[k, s], by_hand(seed, removed), rtol=1e-10, atol=1e-12)


def test_more_trainings_than_fit_are_done_in_several_stacks(monkeypatch):
    monkeypatch.setattr("lightning_dtda.stacking.stacks._FIRST_SIZE", 5)
    monkeypatch.setattr("lightning_dtda.stacking.stacks.fitting", lambda *_: 5)
    subsets = random_subsets(EXAMPLES, 4, fraction_kept=0.8)
    truth = retrained(subsets=subsets, seeds=[1, 2], baseline_seeds=[1])
    for k, removed in enumerate(subsets):
        for s, seed in enumerate((1, 2)):
            torch.testing.assert_close(truth.measurements[k, s], by_hand(seed, removed), rtol=1e-10, atol=1e-12)


def test_trainings_that_do_not_fit_memory_are_left_to_the_trainer(monkeypatch):
    monkeypatch.setattr("lightning_dtda.stacking.stacks.fitting", lambda *_: 1)
    with pytest.raises(CannotStackError, match="not enough memory for several trainings at once"):
        retrained()
    assert torch.equal(retrained(stacked="auto").measurements, retrained(stacked=False).measurements)


@pytest.mark.slow
def test_compiled_stacks_measure_the_same():
    compiled = retrained(stacked=True, compile=True)
    torch.testing.assert_close(compiled.measurements, retrained().measurements, rtol=1e-10, atol=1e-12)


class Kinked(Regressor):
    """In single precision; its second step depends on the last digits of the parameters."""

    def __init__(self):
        super().__init__()
        self.net.float()

    def forward(self, inputs):
        return super().forward(inputs.float())

    def training_step(self, batch, batch_idx):
        digits = torch.cat([parameter.detach().flatten() for parameter in self.parameters()]).double() * 2**25
        odd = digits.floor().sum() % 2
        return super().training_step(batch, batch_idx) * (1 + odd * (self.global_step == 1))


@pytest.mark.slow
def test_what_rounding_decides_is_no_reason_to_refuse(monkeypatch):
    # as on a device that rounds otherwise
    gradient = StackedTraining.gradient
    monkeypatch.setattr(StackedTraining, "gradient", lambda *arguments: gradient(*arguments) * (1 + 3e-7))
    explained = []
    is_rounding = StackedTraining._is_rounding
    monkeypatch.setattr(
        StackedTraining, "_is_rounding", lambda *arguments: explained.append(is_rounding(*arguments)) or explained[-1]
    )
    for seed in range(8):
        truth = retrained(Kinked, subsets=[[2]], seeds=[seed, 90], baseline_seeds=[seed])
        assert truth.about["engine"] == "stacked"
    # of eight references, some went the other way than the Trainer, at a step whose loss is twice as large that way
    assert explained
    assert all(explained)


def test_what_callbacks_do_is_not_taken_for_rounding():
    with pytest.raises(CannotStackError, match="not reproduced between"):
        retrained(Kinked, trainer=lambda: make_trainer(callbacks=[Noise()]))


class Satisfied(pl.Callback):
    """Ends a training early, as it finds."""

    def on_train_batch_end(self, trainer, pl_module, *_):
        trainer.should_stop = trainer.global_step == STEPS - 1


@pytest.mark.parametrize(
    ("module", "trainer", "reason"),
    [
        (Dropping, {}, "draws random numbers"),
        (Plateau, {}, "ReduceLROnPlateau gives each training different learning rates"),
        (Lucky, {}, "the optimizer's hyperparameters or the batch sizes depend on the seed"),
        (Branching, {}, "cannot be differentiated for several trainings at once"),
        (Reset, {}, "initial parameters are not those of the newly created module"),
        (Counting, {}, "buffers change during training, which stacks do not support: seen"),
        (Normalised, {}, "buffers change during training.*running_mean"),
        (Regressor, {"callbacks": [Noise()]}, r"not reproduced between step 0 and step \d"),
        (Regressor, {"callbacks": [EarlyStopping("loss")]}, "EarlyStopping ends each training at a different step"),
        (Regressor, {"callbacks": [Satisfied()]}, "ended after 6 of 7 steps, so others may end at different steps"),
        (Regressor, {"precision": "bf16-mixed"}, "precision='bf16-mixed'"),
        (Regressor, {"max_time": {"hours": 1}}, "a time limit .* ends each training at a different step"),
    ],
)
def test_what_cannot_be_stacked_is_refused_by_name(module, trainer, reason):
    with pytest.raises(CannotStackError, match=f"{reason}.*stacked=False"):
        retrained(module, trainer=lambda: make_trainer(**trainer))


class Augmented(TensorDataset):
    def __getitem__(self, index):
        inputs, targets = super().__getitem__(index)
        return inputs + 0.1 * torch.randn_like(inputs), targets


def test_random_data_sets_are_refused():
    data = DataLoader(Augmented(*examples().tensors), BATCH, shuffle=True)
    with pytest.raises(CannotStackError, match="differs between two calls"):
        retrained(data=data)


@pytest.mark.slow
def test_auto_leaves_to_the_trainer_what_cannot_be_stacked(caplog):
    caplog.set_level("INFO", logger="lightning_dtda")
    arguments = {"module": Dropping, "data": training_loader()}
    auto, trained = retrained(stacked="auto", **arguments), retrained(stacked=False, **arguments)
    assert torch.equal(auto.measurements, trained.measurements)
    assert auto.about["engine"] == "stacked, trainer"  # the first training was the reference of a stack
    assert retrained(stacked="auto").about["engine"] == "stacked"


def test_what_fails_by_the_trainer_is_named_and_another_training_is_compared(monkeypatch):
    class Unlucky(Regressor):
        def on_train_start(self):
            if self.trainer.callbacks and self.net[0].bias[0] == Regressor_first:
                raise ValueError("no luck today")

    pl.seed_everything(SEEDS[0], verbose=False)
    Regressor_first = Unlucky().net[0].bias[0].detach().clone()  # noqa: N806
    with pytest.warns(UserWarning, match="no luck today"):
        truth = retrained(Unlucky)
    assert not truth.measurements[:, 1:].isnan().any()
