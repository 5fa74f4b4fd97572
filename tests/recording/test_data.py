"""A run knows each example that it was trained on, so that none can change unnoticed afterwards."""

import logging
import time

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset, get_worker_info

from lightning_dtda import Ensemble, InfluenceFunctions, Run, TrajectoryRecorder, UnrolledDifferentiation, attribute
from lightning_dtda.errors import RecordingError, ReplayError
from lightning_dtda.recording import data as recording_data
from lightning_dtda.recording.data import TrainingData
from lightning_dtda.replay import refuse_changed_data
from lightning_dtda.replay.fingerprint import example_checksums
from tests.recording.endings import Stop, fail
from tests.recording.modules import EXAMPLES, IndexedExamples, Regressor, loader, shuffled

MANY = 400


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(5, 2)

    def training_step(self, batch, batch_idx):
        inputs, labels = batch
        return torch.nn.functional.cross_entropy(self.net(inputs), labels)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def labelled(flipped=()):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(MANY, 5, generator=generator)
    labels = (inputs[:, 0] > 0).long()
    for index in flipped:
        labels[index] = 1 - labels[index]
    return TensorDataset(inputs, labels)


class InWorkers(IndexedExamples):
    """Must be read in a worker, as a data set must that opens its file when it is first asked."""

    def __getitem__(self, index):
        assert get_worker_info() is not None
        return super().__getitem__(index)


class Slow(IndexedExamples):
    def __len__(self):
        return 600

    def __getitem__(self, index):
        time.sleep(0.004)
        return super().__getitem__(index % EXAMPLES)


class Failing(IndexedExamples):
    """Fails at an index that is not among those that are asked first."""

    def __len__(self):
        return 100

    def __getitem__(self, index):
        if index == 37:
            raise OSError("the file of example 37 is broken")
        return super().__getitem__(index % EXAMPLES)


class Coin(IndexedExamples):
    """Differs at each call, at one index only."""

    def __getitem__(self, index):
        item = super().__getitem__(index)
        return {**item, "inputs": item["inputs"] + torch.rand(())} if index == 22 else item


@pytest.mark.parametrize("estimator", [InfluenceFunctions, UnrolledDifferentiation])
def test_every_estimator_names_the_examples_that_changed(fit, root, estimator):
    fit(Classifier(), DataLoader(labelled(), 32, shuffle=True), TrajectoryRecorder(root, "run"), max_epochs=1)
    queries = TensorDataset(*labelled()[:3])

    def ask(data):
        return attribute(
            Ensemble.open(root), Classifier(), data, queries=queries, estimator=estimator(), progress=False
        )

    assert ask(labelled()).responses.shape == (1, 3, MANY)
    with pytest.raises(ReplayError, match=r"^Example 17 \(and 2 others: 40, 311\) of the training data is not the one"):
        ask(labelled(flipped=[17, 40, 311]))


def test_data_that_are_changed_in_place_are_found_by_the_next_call(fit, root):
    data = labelled()
    fit(Classifier(), DataLoader(data, 32), TrajectoryRecorder(root, "run"), max_epochs=1)
    arguments = {"queries": TensorDataset(*labelled()[:3]), "estimator": InfluenceFunctions(), "progress": False}
    attribute(Ensemble.open(root), Classifier(), data, **arguments)
    data.tensors[1][123] = 1 - data.tensors[1][123]
    with pytest.raises(ReplayError, match=r"^Example 123 of"):
        attribute(Ensemble.open(root), Classifier(), data, **arguments)


def test_in_one_call_the_data_are_compared_once(fit, root, monkeypatch):
    from lightning_dtda.replay import examples

    for run in ("a", "b", "c"):
        fit(Classifier(), DataLoader(labelled(), 32, shuffle=True), TrajectoryRecorder(root, run), max_epochs=1)
    compared = []
    refuse = examples.refuse_changed_data
    monkeypatch.setattr(
        examples, "refuse_changed_data", lambda run, *rest: (compared.append(run.name), refuse(run, *rest))
    )
    estimator = UnrolledDifferentiation(runs_per_batch=1)
    queries = TensorDataset(*labelled()[:3])
    attribute(Ensemble.open(root), Classifier(), labelled(), queries=queries, estimator=estimator, progress=False)
    assert compared == ["a"]


@pytest.mark.parametrize("workers", [0, 2])
def test_every_example_is_recorded(record, workers):
    run = record(Regressor(), shuffled(num_workers=workers), max_epochs=1)
    found, wanted = run.example_checksums, example_checksums(IndexedExamples())
    assert (found.length, found.stride) == (EXAMPLES, 1)
    assert torch.equal(found.values, wanted.values)
    assert len(set(found.values.tolist())) == EXAMPLES


def test_what_training_reads_in_workers_is_read_in_workers(record):
    data = loader(InWorkers(), num_workers=1)
    run = record(Regressor(), data, max_epochs=1)
    assert len(run.example_checksums) == EXAMPLES
    refuse_changed_data(run, data.dataset, data)


def test_batches_that_are_stored_need_no_checksums(record):
    run = record(Regressor(), shuffled(), recorder={"batches": "store"}, max_epochs=1)
    assert run.example_checksums is None
    assert run.manifest.configuration["dataset"]["fingerprint"] is None


@pytest.mark.parametrize("workers", [0, 1])
def test_of_data_that_are_slow_to_read_a_part_is_recorded_and_this_is_said(record, monkeypatch, caplog, workers):
    monkeypatch.setattr(recording_data, "READING_SECONDS", 0.5)
    caplog.set_level(logging.INFO, recording_data.__name__)
    run = record(Regressor(), loader(Slow(), num_workers=workers), max_steps=2)
    found = run.example_checksums
    assert found.stride > 1
    assert found.values[0] == example_checksums(IndexedExamples()).values[0]
    assert found.values[-1] == example_checksums(IndexedExamples()).values[(len(found) - 1) * found.stride % EXAMPLES]
    [message] = [message for message in caplog.messages if "checksum" in message]
    assert message == (
        f"Reading all 600 training examples would take too long: a checksum is recorded for every {found.stride}th "
        f"example, {len(found)} in total. Changes to the others will not be detected."
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_an_example_that_cannot_be_read_is_named(record, workers):
    wanted = r"^Failing\[37\] fails \(OSError: .*the file of example 37 is broken\). Let the data set accept .* 0 to 99"
    with pytest.raises(RecordingError, match=wanted):
        record(Regressor(), loader(Failing(), num_workers=workers), max_epochs=1)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_example_that_differs_at_each_call_is_named(record, workers):
    with pytest.raises(RecordingError, match=r"^Coin\[22\] differs between two calls"):
        record(Regressor(), loader(Coin(), num_workers=workers), max_epochs=1)


def test_the_random_numbers_of_the_training_are_left_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    TrainingData(shuffled())
    assert torch.equal(torch.get_rng_state(), before)


def test_data_that_are_loaded_anew_must_be_the_same_to_the_last_example(fit, root):
    class Reloading(Classifier):
        def train_dataloader(self):
            return DataLoader(labelled(flipped=[21] if self.current_epoch == 2 else []), 64)

    with pytest.raises(RecordingError, match="changed at epoch 2: example 21 is different"):
        fit(Reloading(), None, TrajectoryRecorder(root, "run"), max_epochs=4, reload_dataloaders_every_n_epochs=1)
    assert Run(root / "run").steps == 14


def test_a_training_does_not_go_on_with_other_data(fit, root, tmp_path):
    saver = ModelCheckpoint(tmp_path / "saved", "{step}", every_n_train_steps=4, save_top_k=-1)

    def train(data, *callbacks, **arguments):
        trainer = pl.Trainer(
            callbacks=[TrajectoryRecorder(root, "run"), *callbacks],
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
            max_epochs=3,
        )
        trainer.fit(Classifier(), DataLoader(data, 64), **arguments)

    with pytest.raises(ValueError, match="not finite"):
        train(labelled(), saver, Stop(8, fail))
    checkpoint = tmp_path / "saved" / "step=4.ckpt"
    with pytest.raises(
        RecordingError, match=r"^Example 13 of the training data is not the one that .*run was trained on"
    ):
        train(labelled(flipped=[13]), ckpt_path=checkpoint)
    train(labelled(), ckpt_path=checkpoint)
    run = Run(root / "run")
    assert run.complete
    assert torch.equal(run.example_checksums.values, example_checksums(labelled()).values)
