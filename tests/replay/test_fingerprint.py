"""A data set that is not the one that was recorded is found, and the examples that changed are named."""

import logging
import random
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import Dataset, TensorDataset

from lightning_dtda.errors import ReplayError
from lightning_dtda.replay import dataset_fingerprint, fingerprint, refuse_changed_data
from lightning_dtda.replay.fingerprint import example_checksums
from lightning_dtda.trajectory import Run, RunWriter
from tests.trajectory.runs import manifest

EXAMPLES = 400


def data(examples=EXAMPLES, flipped=()):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(examples, 5, generator=generator)
    labels = torch.randint(2, (examples,), generator=generator)
    for index in flipped:
        labels[index] = 1 - labels[index]
    return TensorDataset(inputs, labels)


def configuration(description):
    return manifest().configuration | {"dataset": description}


def recorded(directory, dataset, checksums=None):
    """A run that says nothing but what it was trained on."""
    directory.mkdir()
    description = {"length": len(dataset), "fingerprint": dataset_fingerprint(dataset)}
    writer = RunWriter(directory, manifest(configuration=configuration(description)))
    writer.add_examples(example_checksums(dataset) if checksums is None else checksums)
    writer.close("complete")
    return Run(directory)


class Slow(Dataset):
    """Takes a while for each example, by the clock of the tests, and notes those that it gave."""

    def __init__(self, clock, seconds=0.005, flipped=()):
        self.clock = clock
        self.seconds = seconds
        self.dataset = data(flipped=flipped)
        self.asked = []

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        self.clock.now += self.seconds
        self.asked.append(index)
        return self.dataset[index]


@pytest.fixture
def clock(monkeypatch):
    """A clock that only slow data move on, and 0.3 seconds to read in; all of them take two."""
    clock = SimpleNamespace(now=0.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr(fingerprint, "time", clock)
    monkeypatch.setattr(fingerprint, "READING_SECONDS", 0.3)
    return clock


@pytest.fixture
def run(tmp_path):
    return recorded(tmp_path / "run", data())


def test_one_flipped_label_of_400_is_found_and_named_wherever_it_is(run):
    refuse_changed_data(run, data())
    positions = [*random.Random(0).sample(range(EXAMPLES), 33), 0, EXAMPLES - 1]
    for position in positions:
        with pytest.raises(
            ReplayError, match=rf"^Example {position} of the training data is not .*400 of 400 were com"
        ):
            refuse_changed_data(run, data(flipped=[position]))


def test_several_changed_examples_are_named_and_many_are_counted(run):
    with pytest.raises(ReplayError, match=r"^Example 17 \(and 2 others: 40, 311\) of the training data is not the one"):
        refuse_changed_data(run, data(flipped=[17, 311, 40]))
    with pytest.raises(ReplayError, match=r"^Example 0 \(and 99 others: 1, 2, 3, 4, 5, 6, 7, 8, 9, \.\.\.\) of"):
        refuse_changed_data(run, data(flipped=range(100)))


def test_another_order_and_another_length_are_found(run):
    inputs, labels = data().tensors
    with pytest.raises(ReplayError, match=r"others: .*in the same order"):
        refuse_changed_data(run, TensorDataset(inputs.flip(0), labels.flip(0)))
    with pytest.raises(ReplayError, match=r"have 399 examples; .* was trained on 400"):
        refuse_changed_data(run, TensorDataset(inputs[1:], labels[1:]))


def test_the_random_numbers_of_the_caller_are_left_alone(run):
    torch.manual_seed(0)
    before = torch.get_rng_state(), random.getstate()
    refuse_changed_data(run, data())
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_of_a_slow_data_set_an_evenly_spread_part_is_recorded(clock):
    slow = Slow(clock)
    found = example_checksums(slow)
    assert found.stride == 8  # 50 examples in 0.25 seconds; the next step would be 50 more
    assert sorted(slow.asked) == list(range(0, EXAMPLES, 8))
    assert clock.now < 0.3
    everything = example_checksums(data())
    assert everything.stride == 1
    assert torch.equal(found.values, everything.values[::8])


def test_where_only_a_part_can_be_compared_this_is_said(run, clock, caplog):
    caplog.set_level(logging.INFO)
    refuse_changed_data(run, data())
    assert not caplog.records
    refuse_changed_data(run, Slow(clock))
    assert caplog.messages == [
        "Only every 8th training example was compared with the record (50 of 400), since reading all of them takes too "
        "long. These are unchanged."
    ]
    with pytest.raises(ReplayError, match=r"^Example 24 of .*50 of 400 were compared"):
        refuse_changed_data(run, Slow(clock, flipped=[23, 24]))


def test_no_more_is_read_than_was_recorded(tmp_path, clock):
    part = example_checksums(data(), seconds=0)
    assert part.stride == 16
    run = recorded(tmp_path / "run", data(), part)
    fast = Slow(clock, seconds=0)
    refuse_changed_data(run, fast)
    assert sorted(fast.asked) == list(range(0, EXAMPLES, 16))
    with pytest.raises(ReplayError, match=r"^Example 32 of .*25 of 400 were compared"):
        refuse_changed_data(run, data(flipped=[32, 33]))


@pytest.mark.parametrize("examples", [1, 2, 15, 16, 31, 32, 33, 1000, 1023, 1024])
def test_every_length_of_a_data_set_is_covered(examples):
    found = example_checksums(data(examples))
    assert (found.stride, len(found)) == (1, examples)
    alone = [example_checksums([data(examples)[index]]).values.item() for index in (0, examples // 2, examples - 1)]
    assert found.values[[0, examples // 2, examples - 1]].tolist() == alone


def test_the_fingerprint_does_not_depend_on_how_fast_the_examples_are_read(clock):
    assert dataset_fingerprint(Slow(clock, seconds=100)) == dataset_fingerprint(data())
    assert fingerprint.fingerprint_of(example_checksums(data())) == dataset_fingerprint(data())
    assert dataset_fingerprint(data(flipped=[0])) != dataset_fingerprint(data())
    assert dataset_fingerprint(data(399)) != dataset_fingerprint(data())


def test_data_sets_that_read_several_examples_at_once_are_read_so():
    class Batched(TensorDataset):
        def __getitem__(self, index):
            raise AssertionError("one by one")

        def __getitems__(self, indices):
            return [TensorDataset.__getitem__(self, index) for index in indices]

    assert torch.equal(example_checksums(Batched(*data().tensors)).values, example_checksums(data()).values)


def test_runs_that_stored_their_batches_have_nothing_to_compare(tmp_path):
    (tmp_path / "run").mkdir()
    description = {"length": EXAMPLES, "fingerprint": None}
    RunWriter(tmp_path / "run", manifest(configuration=configuration(description))).close("complete")
    refuse_changed_data(Run(tmp_path / "run"), data(flipped=[0]))
