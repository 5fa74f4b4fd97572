"""The recorded indices are those that training_step saw, and recording them changes nothing."""

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import Sampler, WeightedRandomSampler

from lightning_dtda.trajectory import Run
from tests.recording.modules import (
    EXAMPLES,
    IndexedExamples,
    Regressor,
    assert_same,
    loader,
    parameters_of,
    shuffled,
)


class Repeating(Sampler):
    """Draws some examples several times in an epoch, others never."""

    def __len__(self):
        return 11

    def __iter__(self):
        return iter(torch.randint(0, 9, (11,)).tolist())


class Unsized:
    """A batch sampler without a length, which makes Lightning fetch one batch ahead.

    Args:
        kind: Makes a batch of a list of indices.
    """

    def __init__(self, kind):
        self.kind = kind

    def __iter__(self):
        for batch in torch.randperm(EXAMPLES).split(5):
            yield self.kind(batch.tolist())


class Refilling:
    """A batch sampler without a length that yields one and the same list, filled anew each time."""

    def __iter__(self):
        batch = []
        for indices in torch.randperm(EXAMPLES).split(5):
            batch[:] = indices.tolist()
            yield batch


def batch_sampler(sampler, **arguments):
    return torch.utils.data.DataLoader(IndexedExamples(), batch_sampler=sampler, **arguments)


LOADERS = {
    "in the data set's order": (loader, {}),
    "shuffled": (shuffled, {}),
    "last batch dropped": (lambda: shuffled(drop_last=True), {}),
    "a generator of its own": (lambda: shuffled(generator=torch.Generator().manual_seed(3)), {}),
    "sampler with repeats": (lambda: loader(sampler=Repeating()), {}),
    "weighted sampler": (lambda: loader(sampler=WeightedRandomSampler(torch.arange(EXAMPLES) + 1.0, 13)), {}),
    "unsized batch sampler of tuples": (lambda: batch_sampler(Unsized(tuple)), {}),
    "unsized batch sampler of tensors": (lambda: batch_sampler(Unsized(torch.tensor)), {}),
    "unsized batch sampler that refills its list": (lambda: batch_sampler(Refilling()), {}),
    "limited batches": (shuffled, {"limit_train_batches": 4}),
    "stopped in mid-epoch": (shuffled, {"max_steps": 9}),
    "accumulated with a short last group": (shuffled, {"accumulate_grad_batches": 4}),
    "overfitted batches": (shuffled, {"overfit_batches": 2}),
    "loader made anew every epoch": (shuffled, {"reload_dataloaders_every_n_epochs": 1}),
    "2 workers": (lambda: shuffled(num_workers=2), {}),
    "2 workers, limited batches": (lambda: shuffled(num_workers=2), {"limit_train_batches": 3}),
    "2 persistent workers": (lambda: shuffled(num_workers=2, persistent_workers=True, prefetch_factor=3), {}),
    "2 workers, unsized batch sampler": (lambda: batch_sampler(Unsized(tuple), num_workers=2), {"max_steps": 8}),
}


class Data(pl.LightningDataModule):
    """Makes the loader when it is asked for, as reloading every epoch needs it."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    def train_dataloader(self):
        return self.make()


def micro_batches(run: Run):
    return [part.indices.tolist() for step in range(run.steps) for part in run.micro_batches(step)]


@pytest.mark.parametrize(("make", "arguments"), LOADERS.values(), ids=LOADERS)
def test_recorded_indices_are_those_that_training_step_saw(record, make, arguments):
    module = Regressor()

    run = record(module, Data(make), **{"max_epochs": 2, **arguments})

    assert micro_batches(run) == module.seen_indices


@pytest.mark.parametrize(
    ("make", "arguments"),
    [pytest.param(*case, id=name, marks=[pytest.mark.slow] * ("2 " in name)) for name, case in LOADERS.items()],
)
def test_training_is_the_same_with_and_without_the_recorder(fit, record, make, arguments):
    trained = []
    for train in (fit, record):
        pl.seed_everything(7, workers=True, verbose=False)
        trained.append(Regressor(dropout=0.3))
        train(trained[-1], Data(make), **{"max_epochs": 2, **arguments})

    assert trained[1].seen_indices == trained[0].seen_indices
    assert_same(parameters_of(trained[1]), parameters_of(trained[0]))


class WithValidation(Regressor):
    """Validates on the very loader object that it is trained with."""

    def validation_step(self, batch, batch_idx):
        self.validated = True


class SharedLoader(pl.LightningDataModule):
    def __init__(self, shared):
        super().__init__()
        self.train_dataloader = self.val_dataloader = lambda: shared


@pytest.mark.parametrize(
    ("shared", "arguments"),
    [
        (shuffled(), {"val_check_interval": 2}),
        pytest.param(shuffled(num_workers=2), {"val_check_interval": 2}, marks=pytest.mark.slow),
        # here both loops get one and the same iterator; the sanity check makes it before the training starts
        (shuffled(num_workers=2, persistent_workers=True), {}),
    ],
    ids=["in mid-epoch", "in mid-epoch with workers", "after epochs with persistent workers"],
)
def test_validation_with_the_same_loader_is_not_mistaken_for_training(record, shared, arguments):
    module = WithValidation()

    run = record(module, SharedLoader(shared), max_epochs=2, **arguments)

    assert module.validated
    assert micro_batches(run) == module.seen_indices


def test_a_loader_that_was_iterated_before_fit_is_recorded_all_the_same(record):
    data, module = shuffled(num_workers=1, persistent_workers=True), Regressor()
    list(data)

    run = record(module, data, max_epochs=1)

    assert micro_batches(run) == module.seen_indices


def test_a_batch_that_the_module_skips_is_in_no_step(record):
    class Skipping(Regressor):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 2 else None  # ends the epoch

    module = Skipping()

    run = record(module, shuffled(), max_epochs=2)

    assert micro_batches(run) == module.seen_indices
    assert run.steps == 4


def test_accumulated_micro_batches_belong_to_their_step(record):
    # 6 batches an epoch, of 4 examples but for the last of 3
    run = record(Regressor(), loader(), max_epochs=1, accumulate_grad_batches=4)

    assert [[len(part.indices) for part in run.micro_batches(step)] for step in range(run.steps)] == [
        [4, 4, 4, 4],
        [4, 3],
    ]
    assert run.batch_indices(1).tolist() == list(range(16, 23))
    # Lightning divides by 4 in the short group, too
    assert run.coefficients(1).tolist() == [1 / 16] * 4 + [1 / 12] * 3


def test_epoch_and_batch_idx_are_those_of_training_step(record):
    run = record(Regressor(), loader(batch_size=10), max_epochs=2)

    assert [(part.epoch, part.batch_idx) for step in range(run.steps) for part in run.micro_batches(step)] == [
        (epoch, batch_idx) for epoch in range(2) for batch_idx in range(3)
    ]


@pytest.mark.parametrize("arguments", [{}, {"num_workers": 1, "persistent_workers": True}], ids=["plain", "persistent"])
def test_the_loader_is_given_back_as_it_was(record, arguments):
    data = shuffled(**arguments)
    sampler = data.batch_sampler
    module = Regressor()

    record(module, data, max_epochs=1)

    assert data.batch_sampler is sampler
    assert data._index_sampler is sampler
    assert data._iterator is None or data._iterator._index_sampler is sampler
    assert "process_dataloader" not in vars(module.trainer.strategy)
