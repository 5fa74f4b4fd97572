"""Seeds recorded at once: the runs that the Trainer's recorder writes, or a refusal."""

import shutil

import lightning.pytorch as pl
import pytest
import torch
from filelock import FileLock
from lightning.pytorch.callbacks import EarlyStopping
from safetensors.torch import load_file
from torch.utils.data import DataLoader, TensorDataset

from lightning_dtda import (
    Ensemble,
    InfluenceFunctions,
    Run,
    TrajectoryRecorder,
    UnrolledDifferentiation,
    attribute,
    record,
)
from lightning_dtda.errors import CannotStackError, ExecutionError, RecordingError
from lightning_dtda.recording import run_name
from lightning_dtda.recording.stack_writer import StackWriter
from lightning_dtda.stacking.size import Footprint, fitting
from lightning_dtda.trajectory import writer
from lightning_dtda.trajectory.storage import read_json, write_json
from tests.retraining.tasks import BATCH, Regressor, examples, make_trainer, queries, training_loader
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

SEEDS = [3, 4, 9, 11]


class Scheduled(Regressor):
    """AdamW in two parameter groups, of which one has a rate of its own; both follow a schedule."""

    def configure_optimizers(self):
        groups = [{"params": self.net[0].parameters(), "lr": 0.01}, {"params": self.net[2].parameters()}]
        optimizer = torch.optim.AdamW(groups, lr=0.05, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Grouped(Regressor):
    """SGD with Nesterov's momentum in one group, and none in the other."""

    def configure_optimizers(self):
        groups = [
            {"params": self.net[0].parameters(), "momentum": 0.8, "nesterov": True},
            {"params": self.net[2].parameters()},
        ]
        return torch.optim.SGD(groups, lr=0.05)


class OwnData(Regressor):
    def train_dataloader(self):
        return training_loader()


class SinglePrecision(Regressor):
    def __init__(self):
        super().__init__()
        self.net.float()


def maker(module=Regressor, data=training_loader, **trainer):
    return lambda: (make_trainer(**trainer), module(), data())


def stacked(root, make=None, seeds=SEEDS, **recorder):
    return record(make or maker(), TrajectoryRecorder(root, **recorder), seeds, stacked=True, progress=False)


def trained(root, make=None, seeds=SEEDS, **recorder):
    failures = record(make or maker(), TrajectoryRecorder(root, **recorder), seeds, progress=False)
    assert not failures


def assert_same_runs(found, wanted, seeds=SEEDS):
    """Compare run directories: manifests but for checksums and metrics, and the tensors of all files."""
    for name in map(run_name, seeds):
        assert sorted(path.name for path in (found / name).iterdir()) == sorted(
            path.name for path in (wanted / name).iterdir()
        )
        manifests = [read_json(root / name / "manifest.json") for root in (found, wanted)]
        for manifest in manifests:
            assert manifest["status"] == "complete"
            manifest["metrics"] = {}  # stacks log nothing
            for entry in [*manifest["checkpoints"], *manifest["shards"]]:
                del entry["crc32"]
        assert manifests[0] == manifests[1]
        for path in (wanted / name).glob("*.safetensors"):
            tensors = load_file(found / name / path.name)
            # names, shapes and dtypes too; of what is double precision, some tens of smooth steps leave rounding only,
            # and coarser records may be rounded to the number next to it
            expected = load_file(path)
            assert tensors.keys() == expected.keys(), path
            for key, tensor in expected.items():
                eps = torch.finfo(tensor.dtype).eps if tensor.is_floating_point() else 0
                rtol = 0 if not eps else max(2 * eps, 1e-10)
                torch.testing.assert_close(tensors[key], tensor, rtol=rtol, atol=1e-12 if eps else 0)


def assert_both_agree(tmp_path, make=None, **recorder):
    assert stacked(tmp_path / "stacked", make, **recorder) == {}
    trained(tmp_path / "trained", make, **recorder)
    assert_same_runs(tmp_path / "stacked", tmp_path / "trained")
    # and seeds differ by far more
    ends = torch.stack([run.theta_vector(run.steps) for run in Ensemble.open(tmp_path / "stacked")])
    assert ends.std(0).min() > 1e-4


@pytest.mark.parametrize("module", [Regressor, Scheduled, Grouped, Partly, Clocked])
def test_stacked_runs_are_those_of_the_trainer(tmp_path, module):
    assert_both_agree(tmp_path, maker(module))


@pytest.mark.slow
@pytest.mark.parametrize("dropping", [True, False])
@pytest.mark.parametrize("shuffle", [True, False])
def test_stacks_and_the_trainer_agree_on_batches_of_different_sizes(tmp_path, dropping, shuffle):
    assert_both_agree(tmp_path, maker(data=lambda: training_loader(batch_size=5, drop_last=dropping, shuffle=shuffle)))


@pytest.mark.slow
@pytest.mark.parametrize("arguments", SETTINGS)
def test_stacks_and_the_trainer_agree_on_clipping_accumulation_and_parts_of_epochs(tmp_path, arguments):
    assert_both_agree(tmp_path, maker(**arguments))


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        {"checkpoint_every": "all"},
        {"checkpoint_every": 2, "gradients": "none"},
        {"checkpoint_every": 100, "gradients": "bfloat16"},
        {"gradients": "float32"},
        {"gradients": "auto", "gradients_budget": 0.0},
    ],
)
def test_what_the_recorder_is_asked_for_is_what_is_recorded(tmp_path, arguments):
    # two groups, whose momentum is in one tensor at the first step
    assert_both_agree(tmp_path, maker(Grouped), **arguments)


def test_shards_end_where_the_recorder_ends_them(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_dtda.recording.shard_buffer._SHARD_STEPS", 2)
    assert_both_agree(tmp_path, checkpoint_every=5)
    assert [entry["last_step"] for entry in Run(tmp_path / "stacked" / "seed-0009").manifest.shards] == [2, 4, 5, 7]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "why"),
    [
        (maker(data=Validating, num_sanity_val_steps=1), "validation draws numbers between epochs"),
        (maker(OwnData, data=lambda: None), "the module has its own loader"),
        (maker(Single, precision="64-true"), "the Trainer casts the module"),
        (maker(data=lambda: training_loader(generator=torch.Generator().manual_seed(5))), "the order is always one"),
    ],
)
def test_stacks_and_the_trainer_agree_on_other_data_and_precision(tmp_path, make, why):
    assert_both_agree(tmp_path, make)


@pytest.mark.parametrize("estimator", [UnrolledDifferentiation(), InfluenceFunctions()])
def test_stacked_runs_are_attributed_as_those_of_the_trainer(tmp_path, estimator):
    stacked(tmp_path / "stacked")
    trained(tmp_path / "trained")
    found, wanted = (
        attribute(
            Ensemble.open(tmp_path / engine),
            Regressor(),
            training_loader(),
            queries=queries(),
            estimator=estimator,
            progress=False,
        )
        for engine in ("stacked", "trained")
    )
    assert found.runs == wanted.runs
    # rounding of the trained parameters, double precision, through some tens of smooth steps
    torch.testing.assert_close(found.responses, wanted.responses, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.baseline, wanted.baseline, rtol=1e-9, atol=1e-12)
    assert wanted.responses.abs().max() > 1e-3


@pytest.mark.slow
def test_stacked_runs_in_single_precision_are_replayed_as_closely(tmp_path):
    inputs, targets = (tensor.float() for tensor in examples().tensors)
    make = maker(SinglePrecision, lambda: DataLoader(TensorDataset(inputs, targets), BATCH, shuffle=True))
    stacked(tmp_path / "stacked", make)
    trained(tmp_path / "trained", make)
    drifts = []
    for engine in ("stacked", "trained"):
        answer = attribute(
            Ensemble.open(tmp_path / engine), SinglePrecision(), make()[2], queries=make()[2], progress=False
        )
        drifts.append([answer.about["drift"][run]["gradients"] for run in answer.runs])
    # a few units in the last place: of seven steps of a tiny network
    assert max(drifts[0]) < max(*drifts[1], 8 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize(
    "limit",
    [("recording.stacked_recording._LARGEST", 2), ("stacking.stacks.fitting", lambda *_: 3)],
    ids=["number", "memory"],
)
def test_more_seeds_than_fit_are_recorded_in_several_stacks(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(f"lightning_dtda.{limit[0]}", limit[1])
    sizes, original = [], StackWriter.__init__

    def counting(self, *, writers, **arguments):
        sizes.append(len(writers))
        original(self, writers=writers, **arguments)

    monkeypatch.setattr(StackWriter, "__init__", counting)
    seeds = [3, 4, 9, 11, 12, 15]
    assert stacked(tmp_path / "stacked", seeds=seeds) == {}
    assert sizes == [2, 2, 1]
    trained(tmp_path / "trained", seeds=seeds)
    assert_same_runs(tmp_path / "stacked", tmp_path / "trained", seeds)


def test_what_a_record_holds_counts_where_it_is_held(monkeypatch):
    free = {"cpu": 8000, "cuda": 4000}
    monkeypatch.setattr("lightning_dtda.stacking.size.available_memory", lambda device: free[device.type])
    theta = torch.zeros(1, 1, dtype=torch.float64)  # 64 bytes in eight copies

    def fits(where, **beside):
        return fitting(36, theta, torch.device(where), Footprint(**beside))

    # half of what is free
    assert fits("cpu") == 40
    assert fits("cpu", device=40, host=60) == 20
    assert fits("cuda") == 20
    assert fits("cuda", device=100) == 10
    assert fits("cuda", host=800) == 5


def test_runs_that_are_complete_stay_and_the_others_are_recorded(tmp_path):
    root = tmp_path / "stacked"
    stacked(root, seeds=SEEDS[:2])
    before = [(root / run_name(seed) / "manifest.json").stat().st_mtime_ns for seed in SEEDS[:2]]
    # a run that was broken off, and one that lost a file
    stacked(root, seeds=[*SEEDS[:2], 20, 21, 22])
    manifest = root / run_name(21) / "manifest.json"
    write_json(manifest, read_json(manifest) | {"status": "recording"})
    (root / run_name(22) / "checkpoint-00000000.safetensors").unlink()
    everything = [*SEEDS, 20, 21, 22]
    assert stacked(root, seeds=everything) == {}
    assert before == [(root / run_name(seed) / "manifest.json").stat().st_mtime_ns for seed in SEEDS[:2]]
    trained(tmp_path / "trained", seeds=everything)
    assert_same_runs(root, tmp_path / "trained", everything)
    assert stacked(root, seeds=everything) == {}


def test_a_single_seed_is_recorded_by_the_trainer(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_dtda.recording.stacked_recording.Stacks", None)  # it would be called
    assert stacked(tmp_path / "stacked", seeds=2) == {}
    trained(tmp_path / "trained", seeds=[0, 1])
    assert_same_runs(tmp_path / "stacked", tmp_path / "trained", [0, 1])


def test_an_interrupted_stack_leaves_what_was_recorded_and_is_recorded_again(tmp_path, monkeypatch):
    original = StackWriter.after_step

    def interrupted(self, taken):
        original(self, taken)
        if taken.steps == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(StackWriter, "after_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            stacked(tmp_path / "stacked")
    trained(tmp_path / "trained")
    broken, whole = (Run(tmp_path / engine / run_name(SEEDS[2])) for engine in ("stacked", "trained"))
    assert (broken.manifest.status, broken.manifest.reason, broken.steps) == ("incomplete", "KeyboardInterrupt", 5)
    assert torch.equal(broken.batch_indices(4), whole.batch_indices(4))
    assert stacked(tmp_path / "stacked") == {}
    assert_same_runs(tmp_path / "stacked", tmp_path / "trained")


def test_a_file_that_cannot_be_written_is_an_error_and_its_run_incomplete(tmp_path, monkeypatch):
    original = writer.write_tensors

    def full(path, *arguments):
        if path.parent.name == run_name(SEEDS[2]) and path.name == "checkpoint-00000006.safetensors":
            raise OSError("no space left on device")
        return original(path, *arguments)

    monkeypatch.setattr(writer, "write_tensors", full)
    with pytest.raises(RecordingError, match="seed-0009 failed: no space left on device"):
        stacked(tmp_path)
    assert Run(tmp_path / run_name(SEEDS[2])).manifest.status == "incomplete"
    assert Run(tmp_path / run_name(SEEDS[0])).complete


def test_a_run_that_another_process_records_is_left_to_it(tmp_path):
    directory = tmp_path / run_name(SEEDS[2])
    directory.mkdir()
    with FileLock(directory / "recording.lock"):
        with pytest.raises(RecordingError, match="seed-0009 is being recorded by another process"):
            stacked(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["seed-0003", "seed-0009"]
    assert stacked(tmp_path) == {}
    assert [run.manifest.seed for run in Ensemble.open(tmp_path)] == SEEDS


def test_a_device_that_is_not_there_is_refused_before_anything_is_trained(tmp_path):
    with pytest.raises(ExecutionError, match="no device 'abacus'"):
        record(maker(), TrajectoryRecorder(tmp_path / "runs"), SEEDS, stacked=True, device="abacus")
    assert not (tmp_path / "runs").exists()


def test_where_the_first_seed_fails_the_next_is_compared(tmp_path, capsys):
    class Unlucky(Regressor):
        def training_step(self, batch, batch_idx):
            # where there is a Trainer only: stacks have none
            if torch.initial_seed() == SEEDS[0] and self.trainer.global_step == 2:
                raise ValueError("no luck today")
            return super().training_step(batch, batch_idx)

    assert stacked(tmp_path, maker(Unlucky)) == {SEEDS[0]: "ValueError: no luck today"}
    assert [run.manifest.seed for run in Ensemble.open(tmp_path)] == SEEDS[1:]


class Numbered(Regressor):
    """Saves a random number among its hyperparameters."""

    def __init__(self, number=None):
        super().__init__()
        self.save_hyperparameters({"number": float(torch.rand(()))})
        self.hparams.rate = 0.1


def data_of_the_seed():
    inputs, targets = examples().tensors
    return DataLoader(TensorDataset(inputs + torch.initial_seed(), targets), BATCH, shuffle=True)


def data_of_one_seed():
    return data_of_the_seed() if torch.initial_seed() == 4 else training_loader()


def data_with_noise():
    class Augmented(TensorDataset):
        def __getitem__(self, index):
            inputs, targets = super().__getitem__(index)
            return inputs + 0.1 * torch.randn_like(inputs), targets

    return DataLoader(Augmented(*examples().tensors), BATCH, shuffle=True)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (maker(Dropping), "draws random numbers"),
        (maker(Lucky), r"the configuration depends on the seed:\n  hyperparameters.lr: \["),
        (maker(Branching), "cannot be differentiated for several trainings at once"),
        (maker(Reset), "initial parameters are not those of the newly created module"),
        (maker(Counting), "buffers change during training, which stacks do not support: seen"),
        (maker(Normalised, lambda: training_loader(drop_last=True)), "buffers change during training.*running_mean"),
        (maker(callbacks=[Noise()]), r"not reproduced between step 0 and step \d"),
        (maker(Numbered), "the configuration depends on the seed:\n  module.hyperparameters.number"),
        (maker(data=data_of_the_seed), "the configuration depends on the seed:\n  dataset.fingerprint"),
        (maker(data=data_of_one_seed), "created for seed 4 differs from that of seed 3:\n  dataset.fingerprint"),
    ],
)
def test_what_cannot_be_stacked_is_refused_by_name_and_the_trainers_run_kept(tmp_path, make, reason):
    with pytest.raises(CannotStackError, match=f"(?s){reason}.*stacked=False"):
        stacked(tmp_path, make)
    assert [path.name for path in tmp_path.iterdir()] == ["seed-0003"]
    assert Run(tmp_path / "seed-0003").complete


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (maker(Plateau), "ReduceLROnPlateau gives each training different learning rates"),
        (maker(callbacks=[EarlyStopping("loss")]), "EarlyStopping ends each training at a different step"),
        (maker(max_time={"hours": 1}), "a time limit .* ends each training at a different step"),
        (maker(precision="bf16-mixed"), "precision='bf16-mixed'"),
        (maker(devices=2, strategy="ddp_spawn"), "spreads a training over 2 processes"),
    ],
)
def test_what_is_known_beforehand_is_refused_before_anything_is_trained(tmp_path, make, reason):
    with pytest.raises(CannotStackError, match=f"{reason}.*stacked=False"):
        stacked(tmp_path / "runs", make)
    assert not (tmp_path / "runs").exists()


def test_a_recorder_that_stores_batches_is_refused_with_the_way_out(tmp_path):
    with pytest.raises(CannotStackError, match=r'batches="store".*stacked=False'):
        stacked(tmp_path, batches="store")
    assert not any(tmp_path.iterdir())


def test_what_cannot_be_stacked_is_left_to_the_trainer_if_it_may_be(tmp_path, caplog):
    with caplog.at_level("INFO", "lightning_dtda"):
        assert record(maker(Dropping), TrajectoryRecorder(tmp_path), SEEDS, stacked="auto", progress=False) == {}
    assert "Not stacked: training_step draws random numbers" in caplog.text
    assert [run.manifest.seed for run in Ensemble.open(tmp_path)] == SEEDS


def test_random_data_fail_as_they_do_by_the_trainer(tmp_path):
    failures = stacked(tmp_path, maker(data=data_with_noise), seeds=[3])
    assert "differs between two calls" in failures[3]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"run": "mine"}, "run='mine', but record names the run of each seed"),
        ({"overwrite": True}, "overwrite=True.*delete the runs to record again"),
    ],
)
def test_what_the_recorder_of_one_run_can_do_is_refused_for_several(tmp_path, arguments, reason):
    with pytest.raises(RecordingError, match=reason):
        stacked(tmp_path, **arguments)
    assert stacked(tmp_path) == {}


def test_runs_that_are_deleted_are_recorded_again(tmp_path):
    for _ in range(2):
        assert stacked(tmp_path) == {}
        assert [run.manifest.seed for run in Ensemble.open(tmp_path)] == SEEDS
        shutil.rmtree(tmp_path / run_name(SEEDS[0]))


@pytest.mark.parametrize("seeds", [0, [], [1, 1], [-1, 2], "ab", 1.5])
def test_what_is_no_set_of_seeds_is_refused(tmp_path, seeds):
    with pytest.raises(RecordingError, match="must give at least one seed"):
        stacked(tmp_path, seeds=seeds)


def test_a_training_without_steps_is_no_reference(tmp_path):
    def make():
        return (pl.Trainer(max_steps=0, accelerator="cpu", logger=False, enable_checkpointing=False), *maker()()[1:])

    assert stacked(tmp_path, make) == {}
    assert not list(tmp_path.iterdir())
