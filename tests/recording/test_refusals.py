"""What cannot be attributed is refused when fit starts, with the way out, and leaves nothing behind."""

import random

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, default_collate

from lightning_dtda import Run, TrajectoryRecorder
from lightning_dtda.errors import DiskSpaceError, RecordingError, UnknownFormatError
from lightning_dtda.recording.checks import refuse_strategy
from lightning_dtda.recording.seeds import record_seeds
from lightning_dtda.trajectory.storage import read_json, write_json
from tests.recording.modules import Classifier, IndexedExamples, Regressor, loader, shuffled


class Stream(IterableDataset):
    def __iter__(self):
        yield from IndexedExamples()


class Augmented(IndexedExamples):
    """Mirrors every other example, by a coin."""

    def __getitem__(self, index):
        item = super().__getitem__(index)
        return {**item, "inputs": item["inputs"] * random.choice([1, -1])}


class Named(IndexedExamples):
    def __getitem__(self, index):
        return super().__getitem__(int(index.removeprefix("example-")))


class EitherWay(Named):
    def __getitem__(self, index):
        return super().__getitem__(str(index))


NAMES = [f"example-{number}" for number in range(9)]


class Batches:
    """Iterates over batches without being a DataLoader."""

    def __len__(self):
        return len(loader())

    def __iter__(self):
        return iter(loader())


class Manual(Regressor):
    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


class Halved(torch.optim.SGD):
    """A subclass may compute anything."""


class ManyOptimizers(Regressor):
    def configure_optimizers(self):
        return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (self.net[0], self.net[3])]


class Stepping(Regressor):
    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        torch.nn.utils.clip_grad_norm_(self.parameters(), 0.1)


def out_of_order():
    data = shuffled(num_workers=1)
    data.in_order = False  # the older versions of torch have no such argument
    return data


class Opened(IndexedExamples):
    """Opens its file when it is first asked, as data sets do that keep their content in one file."""

    def __init__(self, path):
        super().__init__()
        self.path = path
        self.file = None

    def __getitem__(self, index):
        self.file = self.file or self.path.open("rb")
        return super().__getitem__(index)


class Shortened(IndexedExamples):
    """Has another length each time it is made."""

    lengths = iter(())

    def __init__(self):
        super().__init__()
        self.length = next(self.lengths)

    def __len__(self):
        return self.length


def mixing(items):
    batch = default_collate(items)
    return {**batch, "inputs": batch["inputs"] + torch.randn(())}


def dropping(items):
    return default_collate(items[1:])


class Finetuning(BaseFinetuning):
    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer)


class Unfreezing(pl.Callback):
    def on_fit_start(self, trainer, pl_module):
        pl_module.net[0].requires_grad_(False)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 2:
            pl_module.net[0].requires_grad_(True)


class SwitchingMomentum(pl.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        trainer.optimizers[0].param_groups[0]["momentum"] = 0.9 * (trainer.global_step > 1)


def used_optimizer(module):
    optimizer = torch.optim.AdamW(module.parameters())
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


class SparseEmbedding(Classifier):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(23, 3, sparse=True)

    def training_step(self, batch, batch_idx):
        return self.loss(self.net(self.embedding(batch["index"])), batch["index"] % 2)


def mixed_dtypes():
    module = Regressor()
    module.extra = nn.Parameter(torch.zeros((), dtype=torch.float64))
    return module


def foreign_parameter(module):
    return torch.optim.SGD([*module.parameters(), nn.Parameter(torch.zeros(1))], lr=0.1)


def with_optimizer(make):
    return lambda: Regressor(optimizer=lambda module: make(module.parameters(), lr=0.1))


# what is refused: module, data, Trainer arguments, and the remedy that the message has to name
REFUSED = {
    "an iterable data set": (Regressor, lambda: DataLoader(Stream(), 4), {}, "Use a map-style data set"),
    "a dict of loaders": (Regressor, lambda: {"a": shuffled(), "b": shuffled()}, {}, "ConcatDataset"),
    "a list of loaders": (Regressor, lambda: [shuffled(), shuffled()], {}, "ConcatDataset"),
    "a list of one loader": (Regressor, lambda: [shuffled()], {}, "ConcatDataset"),
    "batches that come from no DataLoader": (Regressor, Batches, {}, "Return a DataLoader"),
    "no automatic batching": (
        Regressor,
        lambda: DataLoader(IndexedExamples(), batch_size=None),
        {},
        "give the DataLoader a batch_size",
    ),
    "batches in the order of their arrival": (
        Regressor,
        out_of_order,
        {},
        "in_order=True",
    ),
    "a data set without integer indices": (Regressor, lambda: loader(Named(), sampler=NAMES), {}, "indices 0 to 22"),
    "a sampler of other than integers": (
        Regressor,
        lambda: loader(EitherWay(), sampler=NAMES),
        {},
        "lists of integers",
    ),
    "random augmentation": (
        Regressor,
        lambda: shuffled(dataset=Augmented()),
        {},
        'batches="store".*make the data set deterministic',
    ),
    "a collate_fn that draws random numbers": (
        Regressor,
        lambda: shuffled(collate_fn=mixing),
        {},
        'batches="store".*make the collate_fn deterministic',
    ),
    "a collate_fn that drops examples": (
        Regressor,
        lambda: shuffled(collate_fn=dropping),
        {},
        "the collate_fn leaves examples out",
    ),
    "negative indices": (Regressor, lambda: loader(sampler=range(-8, 0)), {}, "yield indices from 0 to 22"),
    "parameters that are trained later": (
        Regressor,
        shuffled,
        {"callbacks_before": [Finetuning()]},
        "record each phase as a separate training",
    ),
    "an optimizer that has taken steps": (
        lambda: Regressor(used_optimizer),
        shuffled,
        {},
        "Create a new one in configure_optimizers",
    ),
    "a hook that changes steps": (Stepping, shuffled, {}, "Remove it"),
    "manual optimization": (Manual, shuffled, {}, "Use automatic optimization"),
    "half precision": (Regressor, shuffled, {"precision": "bf16-true"}, "32-true.*bf16-mixed"),
    "an optimizer without an adjoint": (with_optimizer(torch.optim.Rprop), shuffled, {}, "Train with one of .*SGD"),
    "a subclass of a supported optimizer": (with_optimizer(Halved), shuffled, {}, "Train with one of .*SGD"),
    "InstanceNorm with running statistics": (
        lambda: Classifier(
            nn.functional.cross_entropy,
            nn.Unflatten(1, (2, 3)),
            nn.InstanceNorm1d(2, track_running_stats=True),
            nn.Flatten(),
        ),
        shuffled,
        {},
        "track_running_stats=False",
    ),
    "sparse gradients": (SparseEmbedding, shuffled, {}, "sparse=False"),
    "parameters of several dtypes": (mixed_dtypes, shuffled, {}, "exactly one"),
    "a parameter that is not the module's": (lambda: Regressor(foreign_parameter), shuffled, {}, "Register them"),
}


def assert_nothing_left(root, trainer):
    assert not root.exists() or not list(root.iterdir())
    assert "process_dataloader" not in vars(trainer.strategy)


@pytest.mark.parametrize(("make_module", "make_data", "arguments", "remedy"), REFUSED.values(), ids=REFUSED)
def test_it_is_refused_with_the_remedy_and_leaves_nothing(fit, root, make_module, make_data, arguments, remedy):
    module, data = make_module(), make_data()
    loaders = [value for value in (data if isinstance(data, list) else [data]) if isinstance(value, DataLoader)]
    samplers = [each.batch_sampler for each in loaders]
    callbacks = arguments.get("callbacks_before", [])
    arguments = {name: value for name, value in arguments.items() if name != "callbacks_before"}

    with pytest.raises(RecordingError, match=remedy):
        fit(module, data, *callbacks, TrajectoryRecorder(root, "run"), max_epochs=2, **arguments)

    assert_nothing_left(root, module.trainer)
    assert [each.batch_sampler for each in loaders] == samplers


def test_several_recorders_are_refused(fit, root):
    class Appending(pl.Callback):
        def setup(self, trainer, pl_module, stage):  # Lightning itself refuses those that it is given
            trainer.callbacks.append(TrajectoryRecorder("elsewhere", "run"))

    with pytest.raises(RecordingError, match="Keep one of them"):
        fit(Regressor(), shuffled(), Appending(), TrajectoryRecorder(root, "run"), max_epochs=1)

    assert not root.exists()


def test_several_optimizers_are_refused(fit, root):
    module = ManyOptimizers()

    # by Lightning itself, where it comes first
    with pytest.raises((RecordingError, RuntimeError), match="optimizers"):
        fit(module, shuffled(), TrajectoryRecorder(root, "run"), max_epochs=1)

    assert_nothing_left(root, module.trainer)


def test_strategies_whose_processes_do_not_see_the_gradient_are_refused():
    for strategy in (FSDPStrategy(), DeepSpeedStrategy.__new__(DeepSpeedStrategy), ModelParallelStrategy()):
        with pytest.raises(RecordingError, match=r"spreads parameters.*strategy=\"ddp\".*devices=1"):
            refuse_strategy(strategy)


def test_ddp_that_does_not_average_gradients_is_refused():
    def hook(state, bucket):
        pass

    for strategy in (DDPStrategy(ddp_comm_hook=hook), DDPStrategy(model_averaging_period=3)):
        with pytest.raises(RecordingError, match="not the mean of the processes' gradients"):
            refuse_strategy(strategy)


def test_a_strategy_of_ones_own_is_refused():
    class Own(DDPStrategy):
        pass

    with pytest.raises(RecordingError, match="Own is not known to apply the mean"):
        refuse_strategy(Own())


STOPPED = {
    "parameters unfrozen in mid-training": (Unfreezing, "Train the same ones throughout"),
    "momentum switched on in mid-training": (SwitchingMomentum, "momentum switched on or off.*Keep momentum on"),
}


@pytest.mark.parametrize(("callback", "remedy"), STOPPED.values(), ids=STOPPED)
def test_a_training_that_changes_its_nature_is_stopped_at_that_step(fit, root, callback, remedy):
    module = Regressor(lambda module: torch.optim.SGD(module.parameters(), lr=0.01))
    with pytest.raises(RecordingError, match=remedy):
        fit(module, shuffled(), callback(), TrajectoryRecorder(root, "run"), max_epochs=2)

    run = Run(root / "run")
    assert (run.manifest.status, run.steps) == ("incomplete", 2)


def test_data_that_change_between_epochs_are_refused_when_they_do(fit, root):
    Shortened.lengths = iter([23, 23, 9])

    class Reloading(Regressor):
        def train_dataloader(self):
            return loader(Shortened())

    with pytest.raises(RecordingError, match="changed at epoch 2"):
        fit(Reloading(), None, TrajectoryRecorder(root, "run"), max_epochs=3, reload_dataloaders_every_n_epochs=1)

    assert Run(root / "run").steps == 12


@pytest.mark.parametrize("workers", [0, 1])
def test_data_are_probed_where_they_are_read(record, tmp_path, workers):
    # a file that is opened in this process shares its position with the workers that are forked from it later
    (tmp_path / "content").write_bytes(b"")
    data = Opened(tmp_path / "content")
    record(Regressor(), loader(data, num_workers=workers), max_epochs=1)
    assert (data.file is None) == (workers > 0)


def test_a_run_that_appears_during_the_checks_is_not_overwritten(fit, root):
    class Rival(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            (root / "run").mkdir(parents=True)
            (root / "run" / "precious").write_text("")

    with pytest.raises(RecordingError, match="exists"):
        fit(Regressor(), shuffled(), Rival(), TrajectoryRecorder(root, "run"), max_epochs=1)

    assert (root / "run" / "precious").exists()


def test_a_trial_run_of_the_trainer_is_not_recorded(fit, root):
    fit(Regressor(), shuffled(), TrajectoryRecorder(root, "run"), fast_dev_run=True)
    assert not root.exists()


def test_a_disk_that_is_too_small_is_refused(fit, root, monkeypatch):
    usage = type("Usage", (), {"free": 10_000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    module = Regressor()

    with pytest.raises(RecordingError, match=r'KiB of disk.*gradients="none"'):
        fit(module, shuffled(), TrajectoryRecorder(root, "run"), max_epochs=100)

    assert_nothing_left(root, module.trainer)


def test_a_disk_that_is_too_small_for_all_seeds_ends_the_whole_call(root, monkeypatch):
    made = []

    def make():
        made.append(pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, max_epochs=100))
        return made[-1], Regressor(), shuffled()

    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 30_000}))
    with pytest.raises(DiskSpaceError, match=r"Recording 3 runs in .* needs about .* of disk space"):
        record_seeds(make, TrajectoryRecorder(root), [0, 1, 2])
    assert len(made) == 1


def test_a_root_that_cannot_be_written_is_refused(fit, tmp_path):
    (tmp_path / "runs").write_text("a file")

    with pytest.raises(RecordingError, match=f"{tmp_path / 'runs' / 'run'} cannot be written.*Choose another root"):
        fit(Regressor(), shuffled(), TrajectoryRecorder(tmp_path / "runs", "run"), max_epochs=1)


def test_the_same_trainer_trains_again_after_the_refused_recorder_is_removed(fit, root):
    module, data = Stepping(), shuffled()
    with pytest.raises(RecordingError):
        fit(module, data, TrajectoryRecorder(root, "run"), max_epochs=1)
    trainer = module.trainer
    trainer.callbacks.clear()

    trainer.fit(Regressor(), data)

    assert trainer.state.finished


def test_a_run_of_an_unknown_format_is_recorded_again_if_it_is_to_be_overwritten(fit, root):
    fit(Regressor(), shuffled(), TrajectoryRecorder(root, "run"), max_epochs=1)
    manifest = root / "run" / "manifest.json"
    write_json(manifest, read_json(manifest) | {"format_version": 99})
    with pytest.raises(UnknownFormatError, match=r"format version 99.* record the run again"):
        Run(root / "run")
    with pytest.raises(RecordingError, match="overwrite=True"):
        fit(Regressor(), shuffled(), TrajectoryRecorder(root, "run"), max_epochs=1)
    fit(Regressor(), shuffled(), TrajectoryRecorder(root, "run", overwrite=True), max_epochs=1)
    assert Run(root / "run").complete


def test_a_run_that_another_process_records_is_not_overwritten(fit, root):
    class Rival(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 2:
                with pytest.raises(RecordingError, match="being recorded by another process"):
                    fit(Regressor(), loader(), TrajectoryRecorder(root, "run", overwrite=True), max_epochs=1)

    fit(Regressor(), shuffled(), Rival(), TrajectoryRecorder(root, "run"), max_epochs=1)

    run = Run(root / "run")
    assert (run.complete, run.steps) == (True, 6)
