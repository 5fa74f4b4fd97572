"""What cannot become one ensemble is refused before it is trained, not when the ensemble is opened."""

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import random_split

from lightning_dtda import Ensemble, Run, TrajectoryRecorder
from lightning_dtda.errors import RecordingError
from tests.recording.endings import Stop, fail
from tests.recording.modules import IndexedExamples, Regressor, loader, sgd


class Counting(pl.Callback):
    """Counts the steps that were trained."""

    steps = 0

    def on_train_batch_end(self, *args):
        self.steps += 1


@pytest.fixture
def train(fit, root):
    def _train(seed, data, *callbacks, optimizer=sgd, max_epochs=2, **recorder):
        pl.seed_everything(seed, verbose=False)
        counting = Counting()
        try:
            fit(
                Regressor(optimizer),
                loader(data()),
                TrajectoryRecorder(root, **recorder),
                counting,
                *callbacks,
                max_epochs=max_epochs,
            )
        finally:
            train_steps.append(counting.steps)

    train_steps = _train.steps = []
    return _train


def split_by_the_seed():
    return random_split(IndexedExamples(), [15, 8])[0]


def split_by_itself():
    return random_split(IndexedExamples(), [15, 8], generator=torch.Generator().manual_seed(0))[0]


def one_label_by_the_seed():
    data = IndexedExamples()
    data.targets[9] += torch.rand(())
    return data


def test_a_split_that_follows_the_seed_is_refused_before_the_second_seed_is_trained(train, root):
    train(0, split_by_the_seed)
    with pytest.raises(
        RecordingError, match=r"(?s)seed-0001 cannot be recorded .*seed-0000, which was trained on other data"
    ) as caught:
        train(1, split_by_the_seed)
    assert "example 0 (and 14 others: 1, 2, 3" in str(caught.value)
    assert "random_split(dataset, lengths, generator=torch.Generator().manual_seed(0))" in str(caught.value)
    assert train.steps == [8, 0]
    assert not (root / "seed-0001").exists()


def test_the_remedy_works(train, root):
    for seed in range(3):
        train(seed, split_by_itself)
    assert len(Ensemble.open(root)) == 3


def test_splits_of_another_length_are_refused_too(train):
    train(0, IndexedExamples)
    with pytest.raises(RecordingError, match=r"(?s)on other data:\n.*dataset.length: 23 vs. 15\n"):
        train(1, split_by_itself)
    assert train.steps == [12, 0]


def test_a_single_example_that_follows_the_seed_is_named(train):
    train(0, one_label_by_the_seed)
    with pytest.raises(RecordingError, match="on other data: example 9 is different"):
        train(1, one_label_by_the_seed)
    assert train.steps == [12, 0]


def test_another_configuration_is_refused_with_what_differs(train):
    train(0, IndexedExamples)
    with pytest.raises(
        RecordingError, match=r"(?s)with another configuration:\n  hyperparameters.lr: .*a separate root"
    ):
        train(1, IndexedExamples, optimizer=lambda module: torch.optim.SGD(module.parameters(), lr=0.2, momentum=0.9))
    assert train.steps == [12, 0]


def test_runs_of_an_ensemble_may_differ_in_what_they_may(train, root):
    for seed in range(2):
        train(seed, IndexedExamples, checkpoint_every=seed + 1)
    assert len(Ensemble.open(root)) == 2


def test_what_is_recorded_again_is_not_compared_with_what_it_replaces(train, root):
    train(0, split_by_the_seed)
    train(1, split_by_the_seed, overwrite=True)
    train(0, split_by_itself, overwrite=True)
    train(1, split_by_itself, overwrite=True)
    assert len(Ensemble.open(root)) == 2


def test_incomplete_and_damaged_runs_are_in_nobodys_way(train, root):
    with pytest.raises(ValueError, match="not finite"):
        train(0, split_by_the_seed, Stop(5, fail))
    assert Run(root / "seed-0000").steps == 5
    (root / "damaged").mkdir()
    (root / "damaged" / "manifest.json").write_text("{")
    train(1, split_by_itself)
    assert Run(root / "seed-0001").complete
