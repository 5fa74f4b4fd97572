"""Seeds of initialisation, order and noise, set apart: what runs share, and what is refused."""

import itertools
import random

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_dtda import Ensemble, TrajectoryRecorder, record
from lightning_dtda.errors import RecordingError
from lightning_dtda.recording import CrossedSeeds
from lightning_dtda.recording.crossed_seeds import NoiseStream, OrderStream

EXAMPLES = TensorDataset(
    torch.randn(40, 3, generator=torch.Generator().manual_seed(0)), torch.randn(40, generator=torch.Generator())
)


class Plain(pl.LightningModule):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, 1))

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self.net(batch[0])[:, 0], batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader():
    return DataLoader(EXAMPLES, batch_size=8, shuffle=True)


def make_of(module=Plain, data=loader, **settings):
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return lambda: (pl.Trainer(max_epochs=3, accelerator="cpu", **quiet, **settings), module(), data())


def recorded(root, seeds, make=None, **arguments):
    assert record(make or make_of(), TrajectoryRecorder(root), seeds, progress=False, **arguments) == {}
    return {tuple(run.manifest.seeds.values()): run for run in Ensemble.open(root)}


def start(run):
    return run.checkpoint(0).theta


def order(run):
    return torch.cat([part.indices for step in range(run.steps) for part in run.micro_batches(step)])


def drawn(run):
    return torch.cat([run.micro_batches(step)[0].rng_states["cpu"] for step in range(run.steps)])


def shares(runs, what, axis):
    """Whether runs have the same of something exactly if they have the same seed on an axis."""
    return all(
        torch.equal(what(one), what(other)) == (of_one[axis] == of_other[axis])
        for (of_one, one), (of_other, other) in itertools.combinations(runs.items(), 2)
    )


def test_runs_share_what_the_seeds_they_share_decide(tmp_path):
    seeds = CrossedSeeds(initialisation=2, order=2, noise=2)
    runs = recorded(tmp_path, seeds, make_of(lambda: Plain(dropout=0.3)))
    assert len(runs) == len(seeds) == 8
    for axis, what in enumerate((start, order, drawn)):
        assert shares(runs, what, axis)


def test_a_source_without_seeds_is_drawn_anew_in_each_run(tmp_path):
    runs = recorded(tmp_path, CrossedSeeds(initialisation=2, order=[3, 5]), make_of(lambda: Plain(dropout=0.3)))
    assert list(runs) == [(0, 3), (1, 3), (0, 5), (1, 5)]
    assert len({tuple(drawn(run).tolist()) for run in runs.values()}) == 4


def test_initial_parameters_are_those_of_an_ordinary_run_with_this_seed(tmp_path):
    runs = recorded(tmp_path / "crossed", CrossedSeeds(initialisation=[4, 5], order=2))
    record(make_of(), TrajectoryRecorder(tmp_path / "plain"), [4], progress=False)
    assert torch.equal(start(runs[4, 0]), start(Ensemble.open(tmp_path / "plain")[0]))


@pytest.mark.slow
def test_parallel_and_stacked_runs_are_the_same(tmp_path):
    seeds = CrossedSeeds(initialisation=2, order=2)
    one_by_one = recorded(tmp_path / "one", seeds)
    for name, arguments in {"parallel": {"workers": 2}, "stacked": {"stacked": True}}.items():
        others = recorded(tmp_path / name, seeds, **arguments)
        for key, run in one_by_one.items():
            assert torch.equal(order(run), order(others[key]))
            # float32; stacks multiply matrices in another order
            torch.testing.assert_close(
                others[key].checkpoint(run.steps).theta, run.checkpoint(run.steps).theta, rtol=1e-5, atol=1e-6
            )


def test_the_order_leaves_the_generators_of_a_gpu_to_the_noise(monkeypatch):
    seeds, seeded = CrossedSeeds(initialisation=2, order=2).of_run(1001), []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: False)
    stream = OrderStream(seeds)
    NoiseStream(seeds, nn.Module())
    with stream.drawing():
        torch.rand(())
    assert seeded == [seeds.of("noise")]


class OwnsGenerator:
    """A sampler with a generator of its own."""

    def __init__(self):
        self.generator = torch.Generator()

    def __iter__(self):
        return iter(torch.randperm(40, generator=self.generator).tolist())

    def __len__(self):
        return 40


def test_a_sampler_draws_other_numbers_from_its_own_generator_than_from_the_global_one():
    sampler = OwnsGenerator()
    stream = OrderStream(CrossedSeeds(initialisation=2, order=2).of_run(1001))
    stream.begin(DataLoader(EXAMPLES, sampler=sampler))
    with stream.drawing():
        assert torch.randperm(40).tolist() != list(sampler)


class Joined:
    """A sampler made of others."""

    def __init__(self, parts):
        self.parts = parts


@pytest.mark.parametrize(
    "joined",
    [
        lambda sampler: [sampler],
        lambda sampler: ("first", sampler),
        lambda sampler: {"first": sampler},
        lambda sampler: [sampler.generator],
    ],
    ids=["list", "tuple", "dict", "generators"],
)
def test_generators_of_samplers_in_a_collection_follow_the_order(joined):
    def seeded(run):
        sampler = OwnsGenerator()
        stream = OrderStream(CrossedSeeds(initialisation=2, order=2).of_run(run))
        stream.begin(DataLoader(EXAMPLES, sampler=Joined(joined(sampler))))
        return sampler.generator.initial_seed()

    assert seeded(0) == seeded(1) != seeded(1000)


def test_a_batch_has_the_same_noise_whether_or_not_batches_before_drew_any():
    def noise(drawn_before):
        stream = NoiseStream(CrossedSeeds(order=2, noise=2).of_run(1000), nn.Module())
        for number in range(2):
            stream.begin("batch")
            if number or drawn_before:
                found = [torch.rand(()), np.random.rand(), random.random()]
        return found

    assert noise(True) == noise(False)


@pytest.mark.parametrize(("device", "times"), [("cpu", 0), ("meta", 1)])
def test_the_noise_starts_anew_on_other_devices_than_gpus_too(device, times, monkeypatch):
    stream, seeded = NoiseStream(CrossedSeeds(order=2, noise=2).of_run(0), nn.Linear(1, 1, device=device)), []
    monkeypatch.setattr(torch, "manual_seed", seeded.append)
    stream.begin("batch")
    assert len(seeded) == times


def test_more_seeds_continue_an_ensemble(tmp_path):
    few = recorded(tmp_path, CrossedSeeds(initialisation=2, order=2))
    written = {run.path: run.path.stat().st_mtime_ns for run in few.values()}
    many = recorded(tmp_path, CrossedSeeds(initialisation=3, order=2))
    assert len(many) == 6
    assert all(path.stat().st_mtime_ns == before for path, before in written.items())


def test_runs_with_other_seeds_are_not_taken_for_these(tmp_path):
    record(make_of(), TrajectoryRecorder(tmp_path), 2, progress=False)
    with pytest.raises(RecordingError, match=r"a single seed, not with initialisation 0 and order 0\. Choose"):
        record(make_of(), TrajectoryRecorder(tmp_path), CrossedSeeds(initialisation=2, order=2), progress=False)


def test_several_processes_are_refused(tmp_path):
    recorder = TrajectoryRecorder(tmp_path)
    recorder.seeds = CrossedSeeds(initialisation=2, order=2).of_run(0)
    trainer, module, _ = make_of(devices=2, strategy="ddp_spawn", num_nodes=1)()
    with pytest.raises(RecordingError, match=r"over 2 processes.*devices=1"):
        recorder.setup(trainer, module, "fit")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({}, "such as initialisation=8, order=8"),
        ({"order": 8}, "such as initialisation=8, order=8"),
        ({"initialisation": [7], "order": 8}, "several seeds each"),
        ({"order": 0}, "order=0 must be a number of seeds"),
        ({"order": [1, 1]}, "different seeds"),
        ({"noise": [1000]}, "from 0 to 999"),
        ({"initialisation": "many"}, "initialisation='many'"),
        ({"initialisation": 1001}, "at most 1000"),
    ],
)
def test_seeds_that_make_no_sense_are_refused(wrong, said):
    with pytest.raises(RecordingError, match=said):
        CrossedSeeds(**wrong)
