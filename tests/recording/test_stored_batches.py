"""Batches that are stored themselves: those that training_step got, whatever the data set draws."""

import pytest
import torch

from lightning_dtda import TrajectoryRecorder
from lightning_dtda.errors import RecordingError
from lightning_dtda.recording import shard_buffer
from tests.recording.modules import IndexedExamples, Regressor, loader, shuffled

STORE = {"batches": "store", "checkpoint_every": 100}


class Augmented(IndexedExamples):
    """Adds other noise to the inputs each time."""

    def __getitem__(self, index):
        item = super().__getitem__(index)
        return item | {"inputs": item["inputs"] + torch.randn(3)}


class Keeping(Regressor):
    """Keeps what it got, then spoils it."""

    def __init__(self):
        super().__init__()
        self.got = []

    def training_step(self, batch, batch_idx):
        self.got.append({name: leaf.clone() for name, leaf in batch.items()})
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        batch["targets"].zero_()


@pytest.mark.parametrize("shard_bytes", [None, 300], ids=["one shard", "many shards"])
@pytest.mark.parametrize(
    ("workers", "arguments"),
    [(0, {}), (2, {}), (0, {"accumulate_grad_batches": 4})],
    ids=["plain", "workers", "accumulated"],
)
def test_they_are_those_that_training_step_got(record, monkeypatch, workers, arguments, shard_bytes):
    if shard_bytes:
        monkeypatch.setattr(shard_buffer, "SHARD_BYTES", shard_bytes)
    module = Keeping()

    run = record(module, shuffled(dataset=Augmented(), num_workers=workers), recorder=STORE, max_epochs=2, **arguments)

    assert len(run.manifest.shards) > 1 if shard_bytes else len(run.manifest.shards) == 1
    micro_batches = [micro_batch for step in range(run.steps) for micro_batch in run.micro_batches(step)]
    assert len(micro_batches) == len(module.got) == 12
    for micro_batch, got in zip(micro_batches, module.got, strict=True):
        assert micro_batch.indices.tolist() == got["index"].tolist()
        # the leaves of a dict come in its own order
        for leaf, wanted in zip(micro_batch.leaves, got.values(), strict=True):
            assert leaf.dtype == wanted.dtype
            assert torch.equal(leaf, wanted)


def test_the_training_is_the_same(fit, record):
    trained = []
    for train in (fit, lambda *given, **arguments: record(*given, recorder=STORE, **arguments)):
        torch.manual_seed(3)
        trained.append(Regressor())
        train(trained[-1], shuffled(dataset=Augmented()), max_epochs=2)

    for plain, recorded in zip(trained[0].parameters(), trained[1].parameters(), strict=True):
        assert torch.equal(plain, recorded)


def test_none_are_kept_unless_asked_for(record):
    assert record(Regressor(), loader(), max_epochs=1).micro_batches(0)[0].leaves == ()


def pad_to_the_longest(items):
    length = max(1, max(int(item["index"]) for item in items))
    batch = torch.utils.data.default_collate(items)
    return batch | {"tokens": torch.zeros(len(items), length)}


def sometimes_double(items):
    batch = torch.utils.data.default_collate(items)
    dtype = torch.float64 if 0 in batch["index"] else torch.float32
    return batch | {"extra": torch.zeros(len(items), dtype=dtype)}


@pytest.mark.parametrize("collate", [pad_to_the_longest, sometimes_double])
def test_batches_of_different_shapes_or_types_are_refused(fit, root, collate):
    with pytest.raises(RecordingError, match="the same data types and shapes throughout: pad the examples, or convert"):
        fit(Regressor(), loader(collate_fn=collate), TrajectoryRecorder(root, "run", batches="store"), max_epochs=1)
