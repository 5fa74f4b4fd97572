"""Seeds set apart for many kinds of trainings: what they decide, and what is said where they decide nothing."""

import itertools
import random

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    Sampler,
    TensorDataset,
    WeightedRandomSampler,
    random_split,
)

from lightning_dtda import Ensemble, TrajectoryRecorder, record
from lightning_dtda.errors import RecordingError
from lightning_dtda.recording import CrossedSeeds
from lightning_dtda.recording.crossed_runs import CrossedRuns
from lightning_dtda.recording.seeds import record_seeds
from lightning_dtda.trajectory.traces import fixed_sources

ALL = CrossedSeeds(initialisation=2, order=2, noise=2)
ONE_AT_A_TIME = [0, 1, 1000, 1000000]
"""Runs that differ from the first in the initialisation, the order and the noise alone."""

TWO = CrossedSeeds(initialisation=2, order=2)


def fixed_generator():
    return torch.Generator().manual_seed(0)


INPUTS = torch.randn(24, 3, generator=fixed_generator())
TARGETS = INPUTS.prod(1)
WEIGHTS = torch.linspace(1, 2, 24)


class Module(pl.LightningModule):
    """A small network; what kinds of trainings do otherwise is in the subclasses."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.2), nn.Linear(4, 1))

    def training_step(self, batch, batch_idx):
        return functional.mse_loss(self.net(batch[0])[:, 0], batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Quiet(Module):
    """Draws nothing in training."""

    def __init__(self):
        super().__init__()
        self.net[2] = nn.Identity()


class Normalised(Module):
    """Has running statistics."""

    def __init__(self):
        super().__init__()
        self.net.insert(1, nn.BatchNorm1d(4))


class MadeInConfigureModel(Module):
    """Makes its layers when Lightning asks for them."""

    def __init__(self):
        pl.LightningModule.__init__(self)
        self.net = None

    def configure_model(self):
        if self.net is None:
            self.net = Module().net


class DrawnInOnFitStart(Module):
    """Draws initial parameters in a hook before the training data are loaded."""

    def on_fit_start(self):
        nn.init.normal_(self.net[0].weight)


class Lazy(Module):
    """Knows the number of its inputs from a first pass in setup."""

    def __init__(self):
        super().__init__()
        self.net[0] = nn.LazyLinear(4)

    def setup(self, stage):
        self.net(INPUTS[:2])


class OwnGenerators(Module):
    """Draws noise from its own generators, one with a fixed seed and one that follows the initial parameters."""

    def __init__(self):
        super().__init__()
        self.first = fixed_generator()
        self.second = np.random.default_rng(np.random.randint(1000))

    def training_step(self, batch, batch_idx):
        noise = torch.randn(3, generator=self.first) + float(self.second.normal())
        return super().training_step([batch[0] + 0.1 * noise, batch[1]], batch_idx)


class DrawsAsManyAsThereAre(Module):
    """Draws a number for each value above zero: how many depends on the batch, as with padding."""

    def training_step(self, batch, batch_idx):
        torch.rand(int((batch[0] > 0).sum()))
        return super().training_step(batch, batch_idx)


class Reseeded(Module):
    """Seeds the noise once more."""

    def on_train_start(self):
        torch.manual_seed(int(1000 * self.net[0].weight.abs().sum()))


class Augmented(Dataset):
    """Adds noise from torch, NumPy and Python each time it is asked."""

    def __len__(self):
        return len(INPUTS)

    def __getitem__(self, index):
        noise = torch.randn(()) + np.random.normal() + random.random()
        return INPUTS[index] + 0.1 * noise.float(), TARGETS[index]


class OwnNoise(Augmented):
    """Draws from a generator of its own, with a seed that is drawn or given."""

    def __init__(self, seed=None):
        self.generator = np.random.default_rng(np.random.randint(2**31) if seed is None else seed)

    def __getitem__(self, index):
        return INPUTS[index] + float(self.generator.normal()), TARGETS[index]


class NumpyBatches(Sampler):
    """Batches from NumPy's generator, of its own."""

    def __init__(self, seed=0):
        self.generator = np.random.default_rng(seed)

    def __iter__(self):
        return iter(self.generator.permutation(24).reshape(3, 8).tolist())

    def __len__(self):
        return 3


class PlainBatches:
    """Batches from Python's generator, around another sampler; an iterable of no class of torch's."""

    def __init__(self):
        self.inner, self.generator = RandomSampler(INPUTS, generator=fixed_generator()), random.Random(0)

    def __iter__(self):
        batches = [*BatchSampler(self.inner, 8, drop_last=False)]
        self.generator.shuffle(batches)
        return iter(batches)

    def __len__(self):
        return 3


class DrawsNextEpoch(Sampler):
    """Draws the order of the next epoch at the end of one."""

    def __init__(self):
        self.order = [*range(24)]

    def __iter__(self):
        yield from self.order
        self.order = torch.randperm(24).tolist()

    def __len__(self):
        return 24


class BatchesWithoutLength:
    """Batches of the next epoch from NumPy's global generator, drawn when nothing is left of one."""

    def __init__(self):
        self.order = np.arange(24)

    def __iter__(self):
        yield from self.order.reshape(3, 8).tolist()
        self.order = np.random.permutation(24)


class SplitInSetup(pl.LightningDataModule):
    """Leaves out some examples at random."""

    def __init__(self, generator=None):
        super().__init__()
        self.generator = generator

    def setup(self, stage):
        self.training, _ = random_split(examples(), [16, 8], generator=self.generator)

    def train_dataloader(self):
        return loader(self.training)


def examples():
    return TensorDataset(INPUTS, TARGETS)


def loader(data=None, **settings):
    return DataLoader(data or examples(), **({"batch_size": 8, "shuffle": True} | settings))


def seed_worker(worker):
    """As in torch's notes on reproducibility."""
    seed = torch.initial_seed() % 2**32
    np.random.seed(seed)
    random.seed(seed)


KINDS = {
    "running statistics": (Normalised, loader),
    "made in configure_model": (MadeInConfigureModel, loader),
    "drawn in on_fit_start": (DrawnInOnFitStart, loader),
    "lazy layer": (Lazy, loader),
    "own generators": (OwnGenerators, loader),
    "seeded once more": (Reseeded, loader),
    "draws as many as there are": (DrawsAsManyAsThereAre, loader),
    "generator of the loader": (Module, lambda: loader(generator=fixed_generator())),
    "weighted sampler": (Module, lambda: loader(shuffle=False, sampler=WeightedRandomSampler(WEIGHTS, 24))),
    "weighted sampler with a generator": (
        Module,
        lambda: loader(shuffle=False, sampler=WeightedRandomSampler(WEIGHTS, 24, generator=fixed_generator())),
    ),
    "batches from NumPy": (Module, lambda: DataLoader(examples(), batch_sampler=NumpyBatches())),
    "batches from Python": (Module, lambda: DataLoader(examples(), batch_sampler=PlainBatches())),
    "next epoch drawn at the end of one": (
        Module,
        lambda: loader(shuffle=False, sampler=DrawsNextEpoch(), num_workers=1),
    ),
    "batches without a length": (Module, lambda: DataLoader(examples(), batch_sampler=BatchesWithoutLength())),
    "split with a generator": (Module, lambda: SplitInSetup(fixed_generator())),
    "augmentation": (Quiet, lambda: loader(Augmented())),
    "workers": (Quiet, lambda: loader(Augmented(), num_workers=2)),
    "persistent workers": (Module, lambda: loader(Augmented(), num_workers=2, persistent_workers=True)),
    "workers, as torch recommends": (
        Quiet,
        lambda: loader(Augmented(), num_workers=2, worker_init_fn=seed_worker, generator=fixed_generator()),
    ),
}


def trainer(epochs=2):
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return pl.Trainer(max_epochs=epochs, accelerator="cpu", **quiet)


def recorded(root, module, data, seeds=TWO, chosen=None, epochs=2, **settings):
    def make():
        return trainer(epochs), module(), data()

    recorder = TrajectoryRecorder(root, **settings)
    if chosen is None:
        failures = record(make, recorder, seeds, progress=False)
    else:
        failures = record_seeds(make, recorder, chosen, crossed=seeds)
    assert failures == {}
    return Ensemble.open(root)


def decided(run):
    """What the seeds of initialisation, order and noise decide in a run."""
    parts = [part for step in range(run.steps) for part in run.micro_batches(step)]
    start = run.checkpoint(0)
    states = [part.rng_states[name] for part in parts for name in sorted(part.rng_states)]
    return (
        torch.cat([start.theta, *(buffer.reshape(-1).float() for _, buffer in sorted(start.buffers.items()))]),
        torch.cat([part.indices for part in parts]),
        torch.cat([torch.empty(0), *states, *(leaf.reshape(-1) for part in parts for leaf in part.leaves)]),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_each_source_changes_what_it_decides_and_nothing_else(kind, tmp_path):
    module, data = KINDS[kind]
    batches = "store" if kind == "augmentation" or "workers" in kind else "indices"
    ensemble = recorded(tmp_path, module, data, ALL, ONE_AT_A_TIME, batches=batches)
    checks = CrossedRuns(tmp_path, ALL)
    for seed in ONE_AT_A_TIME:
        checks.add(seed)
    first, *others = map(decided, ensemble)
    for source, other in enumerate(others):
        same = [torch.equal(one, another) for one, another in zip(first, other, strict=True)]
        # stored batches are other ones in another order
        follows = {source, 2} if source == 1 and batches == "store" else {source}
        assert same == [number not in follows for number in range(3)]


@pytest.mark.parametrize("kind", ["next epoch drawn at the end of one", "batches without a length"])
def test_what_is_drawn_at_the_end_of_an_epoch_counts(kind, tmp_path):
    (run,) = recorded(tmp_path, *KINDS[kind], TWO, [1], epochs=4)
    seed = TWO.of_run(1).of("order")
    torchs, numpys = torch.Generator().manual_seed(seed), np.random.RandomState(seed)
    epochs = [[*range(24)]]
    for _ in range(3):
        if kind == "batches without a length":
            epochs.append(numpys.permutation(24).tolist())
        else:
            epochs.append(torch.randperm(24, generator=torchs).tolist())
    assert decided(run)[1].tolist() == list(itertools.chain.from_iterable(epochs))


def test_a_step_draws_the_same_noise_however_many_numbers_others_drew(tmp_path):
    first, _, other, _ = map(decided, recorded(tmp_path, DrawsAsManyAsThereAre, loader, ALL, ONE_AT_A_TIME))
    assert not torch.equal(first[1], other[1])
    assert torch.equal(first[2], other[2])


class Failing(Quiet):
    """Fails after a few steps."""

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.global_step == 2:
            raise ValueError("two steps")


@pytest.mark.parametrize("how", ["trained", "failing", "stacked"])
def test_a_loader_has_its_generator_again_after_a_recording(how, tmp_path):
    sampler = WeightedRandomSampler(WEIGHTS, 24)
    data = loader(num_workers=1, shuffle=False, sampler=sampler, generator=fixed_generator())
    generator = data.generator

    def make():
        return trainer(), Failing() if how == "failing" else Quiet(), data

    if how == "stacked":
        assert record(make, TrajectoryRecorder(tmp_path), TWO, stacked=True, progress=False) == {}
    else:
        failures = record_seeds(make, TrajectoryRecorder(tmp_path), [0], crossed=TWO)
        assert failures == ({0: "ValueError: two steps"} if how == "failing" else {})
    assert data.generator is generator


def test_generators_of_a_module_stay_as_they_are_without_seeds_of_the_noise(tmp_path):
    runs = recorded(tmp_path, OwnGenerators, loader)
    states = [run.micro_batches(0)[0].rng_states["own.0"] for run in runs]
    assert all(torch.equal(states[0], other) for other in states)


class Adapted(Quiet):
    """Trains a layer behind frozen ones, which are drawn, or loaded."""

    def __init__(self, loaded=None):
        super().__init__()
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        if loaded is not None:
            self.frozen.load_state_dict(loaded)

    def training_step(self, batch, batch_idx):
        return super().training_step([self.frozen(batch[0]), batch[1]], batch_idx)


@pytest.mark.parametrize("loaded", [None, {"weight": torch.eye(3), "bias": torch.zeros(3)}], ids=["drawn", "loaded"])
def test_frozen_layers_follow_the_initialisation_unless_they_are_loaded(loaded, tmp_path):
    runs = recorded(tmp_path, lambda: Adapted(loaded), loader)
    frozen = [run.checkpoint(0).buffers["frozen.weight"] for run in runs]
    seeds = [run.manifest.seeds["initialisation"] for run in runs]
    for (one, first), (other, second) in itertools.combinations(zip(seeds, frozen, strict=True), 2):
        assert torch.equal(first, second) == (one == other or loaded is not None)


class Late(Module):
    """Draws its initial parameters after the training data are loaded."""

    def on_train_start(self):
        nn.init.normal_(self.net[0].weight)


class Shared(Module):
    """Has a layer with running statistics that all trainings use."""

    layer = (nn.BatchNorm1d(3, affine=False),)

    def __init__(self):
        super().__init__()
        self.frozen = self.layer[0]

    def training_step(self, batch, batch_idx):
        return super().training_step([self.frozen(batch[0]), batch[1]], batch_idx)


class Loaded(Module):
    """Starts from the same parameters always, as those of a file."""

    def __init__(self):
        super().__init__()
        for parameter in self.parameters():
            nn.init.ones_(parameter)


class Kept(RandomSampler):
    """Draws an order when it is made."""

    def __init__(self, data):
        super().__init__(data)
        self.order = torch.randperm(len(data)).tolist()

    def __iter__(self):
        return iter(self.order)


class Seeded(RandomSampler):
    """Draws the order of each epoch from a seed that is a number."""

    def __iter__(self):
        return iter(torch.randperm(len(self), generator=fixed_generator()).tolist())


def sampled(sampler):
    return lambda: loader(shuffle=False, sampler=sampler(examples()))


WRONG = {
    "parameters drawn late": (Late, loader, TWO, "same seed of the initialisation, 0, but do not start from the same"),
    "layers of all trainings": (Shared, loader, TWO, "layers that an earlier training changed"),
    "parameters of a file": (Loaded, loader, TWO, "only in the seed of the initialisation, .*start from the same"),
    "a kept order": (Module, sampled(Kept), TWO, r"same seed of the order, 0, .* let its __iter__ draw"),
    "an order with a number for a seed": (
        Module,
        sampled(Seeded),
        TWO,
        "seed of the order, .*have the same batches: the order contributes nothing",
    ),
    "no shuffling": (Module, lambda: loader(shuffle=False), TWO, r"Set shuffle=True"),
    "no noise": (Quiet, loader, ALL, "seed of the noise, .*draw no other random numbers"),
    "data with a seed of their own": (
        Quiet,
        lambda: loader(OwnNoise()),
        ALL,
        "same seed of the noise, 0, but do not draw the same",
    ),
    "data with a number for a seed": (
        Quiet,
        lambda: loader(OwnNoise(0)),
        ALL,
        "seed of the noise, .*draw no other random numbers",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_seeds_cannot_decide_is_found_after_few_runs(kind, tmp_path, monkeypatch):
    module, data, seeds, said = WRONG[kind]
    monkeypatch.setattr(Shared, "layer", (nn.BatchNorm1d(3, affine=False),))
    many = CrossedSeeds(**{source: [0, 1, 2] for source in seeds.levels})
    for _ in range(2):  # the second time, the runs are there already
        with pytest.raises(RecordingError, match=said):
            recorded(tmp_path, module, data, many, batches="store" if "data" in kind else "indices")
    assert len([*tmp_path.glob("seed-*")]) <= (6 if seeds is TWO else 11)


def test_a_split_without_a_generator_is_refused(tmp_path):
    failures = record(lambda: (trainer(), Module(), SplitInSetup()), TrajectoryRecorder(tmp_path), TWO, progress=False)
    assert sorted(failures) == [1, 1001]  # those with another seed of the initialisation
    assert "generator=torch.Generator().manual_seed(0)" in failures[1]


class PicksOne(Quiet):
    """Starts from one of three checkpoints."""

    def __init__(self):
        number = int(torch.randint(0, 3, ()))
        super().__init__()
        for parameter in self.parameters():
            nn.init.constant_(parameter, 0.1 * number)


def test_seeds_that_happen_to_decide_the_same_do_not_stop_a_recording(tmp_path):
    runs = recorded(tmp_path, PicksOne, loader, CrossedSeeds(initialisation=[1, 3, 0, 2], order=2))
    starts = {run.manifest.seeds["initialisation"]: run.checkpoint(0).theta for run in runs}
    assert torch.equal(starts[1], starts[3])  # by chance
    assert len(runs) == 8


def test_seeds_that_decide_nothing_stop_a_recording_after_three_pairs(tmp_path):
    with pytest.raises(RecordingError, match="the initialisation contributes nothing"):
        recorded(tmp_path, Loaded, loader, CrossedSeeds(initialisation=8, order=8))
    assert len([*tmp_path.glob("seed-*")]) == 10


class DropsOutAtFirst(Module):
    """Drops out values in a few steps that no comparison of single steps sees."""

    def training_step(self, batch, batch_idx):
        self.net[2].train(1 <= self.global_step < 3)
        return super().training_step(batch, batch_idx)


class NoisyGradients(Quiet):
    """Adds noise to gradients, after training_step."""

    def on_after_backward(self):
        for parameter in self.parameters():
            parameter.grad += 0.1 * torch.randn_like(parameter)


@pytest.mark.parametrize("module", [DropsOutAtFirst, NoisyGradients])
@pytest.mark.parametrize("seeds", [CrossedSeeds(order=2, noise=2), ALL], ids=["two", "all"])
def test_noise_that_comparisons_do_not_see_is_not_taken_for_none(module, seeds, tmp_path):
    runs = recorded(tmp_path, module, loader, seeds)
    assert len(runs) == len(seeds)
    assert fixed_sources(runs) == []


def test_a_source_that_changes_nothing_is_known_afterwards(tmp_path):
    recorded(tmp_path, Quiet, loader, ALL, [0, 1, 1000, 1000000])
    assert fixed_sources(Ensemble.open(tmp_path)) == ["noise"]


REMEDIES = {
    "draw the parameters earlier": (DrawnInOnFitStart, loader, TWO),
    "leave out the seeds of the initialisation": (Loaded, loader, CrossedSeeds(order=2, noise=2)),
    "leave out the seeds of the order": (
        Module,
        lambda: loader(shuffle=False),
        CrossedSeeds(initialisation=2, noise=2),
    ),
    "leave out the seeds of the noise": (Quiet, loader, TWO),
    "draw when iterated over": (Module, sampled(RandomSampler), TWO),
    "split with a generator": (Module, lambda: SplitInSetup(fixed_generator()), TWO),
}


@pytest.mark.parametrize("kind", REMEDIES)
def test_the_remedy_works(kind, tmp_path):
    module, data, seeds = REMEDIES[kind]
    assert len(recorded(tmp_path, module, data, seeds)) == 4
