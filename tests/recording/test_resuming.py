"""A training that goes on from a checkpoint is one trajectory: no step lost, none there twice."""

import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_dtda import Ensemble, Run, TrajectoryRecorder, UnrolledDifferentiation, attribute
from lightning_dtda.errors import RecordingError
from tests.recording.endings import Stop, fail
from tests.recording.modules import (
    IndexedExamples,
    Regressor,
    adamw,
    assert_same,
    loader,
    sgd,
    shuffled,
    two_groups_with_a_scheduler,
)

STEPS_PER_EPOCH = 6


class Watch(pl.Callback):
    """Notes the examples of each step and the parameters after it: a route of its own to the trajectory."""

    def __init__(self):
        self.thetas, self.indices, self._pending = {}, {}, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self._pending += batch["index"].tolist()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        step = trainer.global_step
        if step not in self.thetas:
            self.thetas[step] = {name: p.detach().clone() for name, p in pl_module.named_parameters()}
            self.indices[step - 1] = self._pending
            self._pending = []


@pytest.fixture
def train(root, tmp_path):
    """Train, saving checkpoints under ``tmp_path / "saved"`` after every ``every`` steps."""

    def _train(*callbacks, optimizer=sgd, data=None, every=4, recorder=None, ckpt_path=None, dropout=0.0, **arguments):
        pl.seed_everything(7, verbose=False)
        saver = ModelCheckpoint(tmp_path / "saved", "{step}", every_n_train_steps=every, save_top_k=-1)
        trainer = pl.Trainer(
            callbacks=[TrajectoryRecorder(root, **(recorder or {})), *callbacks, saver],
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **({"max_epochs": 3} | arguments),
        )
        trainer.fit(Regressor(optimizer, dropout), shuffled() if data is None else data, ckpt_path=ckpt_path)
        return trainer

    return _train


def saved(tmp_path, step):
    return tmp_path / "saved" / f"step={step}.ckpt"


def fail_at(step):
    return Stop(step, fail)


@pytest.mark.parametrize("checkpoint_every", [3, 4, 100])
@pytest.mark.parametrize("optimizer", [sgd, adamw, two_groups_with_a_scheduler])
@pytest.mark.parametrize("step", [4, 6], ids=["in mid-epoch", "between epochs"])
def test_the_record_is_that_of_what_was_trained(train, root, tmp_path, step, optimizer, checkpoint_every):
    first, second = Watch(), Watch()
    arguments = {"optimizer": optimizer, "every": step, "recorder": {"checkpoint_every": checkpoint_every}}
    with pytest.raises(ValueError, match="not finite"):
        train(first, fail_at(9), **arguments)

    train(second, ckpt_path=saved(tmp_path, step), **arguments)

    run = Run(root / "seed-0007")
    assert run.complete
    thetas = {t: theta for t, theta in first.thetas.items() if t <= step} | second.thetas
    indices = {t: those for t, those in first.indices.items() if t < step} | second.indices
    assert sorted(indices) == list(range(run.steps))
    for t in range(run.steps):
        assert run.batch_indices(t).tolist() == indices[t]
        assert_same(run.theta(t + 1), thetas[t + 1])
    listed = {entry["file"] for entry in run.manifest.files}
    assert listed == {path.name for path in run.path.glob("*.safetensors")}


@pytest.mark.parametrize("gradients", ["float32", "none"])
def test_it_is_replayed_with_dropout_and_accumulation(train, root, tmp_path, gradients):
    arguments = {"dropout": 0.3, "accumulate_grad_batches": 2, "recorder": {"gradients": gradients}, "every": 2}
    with pytest.raises(ValueError, match="not finite"):
        train(fail_at(5), **arguments)
    train(ckpt_path=saved(tmp_path, 4), **arguments)

    # every gradient is computed again and compared with its record
    answer = attribute(
        Ensemble.open(root),
        Regressor(dropout=0.3),
        loader(),
        queries=IndexedExamples(),
        estimator=UnrolledDifferentiation(horizon=None),
        progress=False,
    )

    assert answer.about["drift"]["seed-0007"]["parameters"] < 1e-6


def test_it_is_attributed_as_the_same_training_in_one_go(train, fit, root, tmp_path):
    # without a shuffle, a training that goes on between epochs is the uninterrupted one
    with pytest.raises(ValueError, match="not finite"):
        train(fail_at(9), data=loader(), every=6, recorder={"checkpoint_every": 100})
    train(data=loader(), every=6, ckpt_path=saved(tmp_path, 6), recorder={"checkpoint_every": 100})
    pl.seed_everything(7, verbose=False)
    fit(Regressor(), loader(), TrajectoryRecorder(root, "whole", checkpoint_every=100), max_epochs=3)

    ensemble = Ensemble.open(root)
    exact = UnrolledDifferentiation(horizon=None)
    answer = attribute(ensemble, Regressor(), loader(), queries=IndexedExamples(), estimator=exact, progress=False)

    assert answer.runs == ("seed-0007", "whole")
    torch.testing.assert_close(answer.responses[0], answer.responses[1], rtol=1e-5, atol=1e-7)


def test_a_complete_training_is_prolonged(train, root, tmp_path):
    train(every=6, max_epochs=1)
    assert Run(root / "seed-0007").steps == 6

    train(every=6, max_epochs=2, ckpt_path=saved(tmp_path, 6))

    run = Run(root / "seed-0007")
    assert (run.complete, run.steps) == (True, 12)
    assert run.manifest.configuration["training"]["max_epochs"] == 2


def test_every_step_before_a_checkpoint_is_on_disk_when_it_is_saved(train, root):
    class Reader(pl.Callback):
        def __init__(self):
            self.steps = []

        def on_train_batch_end(self, trainer, *args):
            trainer.save_checkpoint(root / "now.ckpt")
            state = torch.load(root / "now.ckpt", weights_only=False)["callbacks"]["TrajectoryRecorder"]
            assert state == {"run": "seed-0007", "steps": trainer.global_step}
            self.steps.append(Run(root / "seed-0007").steps)

    reader = Reader()
    train(reader, max_epochs=1, recorder={"checkpoint_every": 100})

    assert reader.steps == [1, 2, 3, 4, 5, 6]


def spoil(step):
    """Let the checkpoint hold parameters of another training."""

    def change(root, tmp_path):
        path = saved(tmp_path, step)
        content = torch.load(path, weights_only=False)
        content["state_dict"] = {name: value + 1 for name, value in content["state_dict"].items()}
        torch.save(content, path)

    return change


def forget(root, tmp_path):
    path = saved(tmp_path, 4)
    content = torch.load(path, weights_only=False)
    del content["callbacks"]["TrajectoryRecorder"]
    torch.save(content, path)


def lose(root, tmp_path):
    (root / "seed-0007").rename(root / "lost")


def unchanged(root, tmp_path):
    pass


REFUSED = {
    "without the recorder's state": (forget, {}, r"resumes at step 4, .*not recorded.*no ckpt_path"),
    "without its record": (lose, {}, "4 recorded steps, but their record cannot be read.*does not exist"),
    "with other parameters": (spoil(4), {}, "parameters are not those of .*seed-0007 after 4 steps"),
    "with another batch size": (unchanged, {"data": shuffled(batch_size=5)}, "batch_size: 4 vs. 5"),
    "with another optimizer": (unchanged, {"optimizer": adamw}, None),
    "with other gradients": (unchanged, {"recorder": {"gradients": "bfloat16"}}, "same settings throughout"),
    "with stored batches": (unchanged, {"recorder": {"batches": "store"}}, None),
}


@pytest.mark.parametrize(("change", "arguments", "remedy"), REFUSED.values(), ids=REFUSED)
def test_it_is_refused(train, root, tmp_path, change, arguments, remedy):
    with pytest.raises(ValueError, match="not finite"):
        train(fail_at(5))
    change(root, tmp_path)
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}

    # what Lightning or torch refuse first is refused too
    with pytest.raises((RecordingError, KeyError, ValueError), match=remedy):
        train(ckpt_path=saved(tmp_path, 4), **arguments)

    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before


def test_a_checkpoint_that_was_loaded_for_another_purpose_is_not_resumed_from(train, root, tmp_path, fit):
    train(max_epochs=1)

    class Validated(Regressor):
        def validation_step(self, batch, batch_idx):
            pass

    trainer = pl.Trainer(
        callbacks=[TrajectoryRecorder(tmp_path / "others", "other")],
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.validate(Validated(), loader(), ckpt_path=saved(tmp_path, 4))
    trainer.fit(Validated(), loader())

    assert Run(tmp_path / "others" / "other").steps == STEPS_PER_EPOCH
