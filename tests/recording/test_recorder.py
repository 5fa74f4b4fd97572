"""How a recorder is made, and where it puts its runs."""

import json

import lightning.pytorch as pl
import pytest
from jsonargparse import ArgumentParser

from lightning_dtda import Run, TrajectoryRecorder
from lightning_dtda.errors import RecordingError
from tests.recording.modules import IndexedExamples, Regressor, loader

ARGUMENTS = {
    "root": "runs",
    "run": "first",
    "gradients": "bfloat16",
    "gradients_budget": 0.5,
    "checkpoint_every": 10,
    "overwrite": True,
}


def test_all_arguments_can_be_written_in_json_and_read_by_a_configuration():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(TrajectoryRecorder, "recorder")

    made = parser.instantiate(parser.parse_string(json.dumps({"recorder": ARGUMENTS}))).recorder

    assert {name: getattr(made, name) for name in ARGUMENTS} == {**ARGUMENTS, "root": made.root}
    assert str(made.root) == "runs"


@pytest.mark.parametrize(
    "arguments",
    [
        {"gradients": "float16"},
        {"checkpoint_every": 0},
        {"checkpoint_every": "none"},
        {"run": ""},
        {"run": ".."},
        {"run": "a/b"},
        {"run": "/a"},
    ],
)
def test_arguments_that_cannot_work_are_refused(arguments):
    [name] = arguments

    with pytest.raises(RecordingError, match=f"{name}="):
        TrajectoryRecorder("runs", **arguments)


def test_a_run_is_named_after_its_seed(fit, root):
    pl.seed_everything(7, verbose=False)

    fit(Regressor(), loader(), TrajectoryRecorder(root), max_epochs=1)

    assert Run(root / "seed-0007").manifest.seed == 7


def test_a_run_without_seed_or_name_is_refused(fit, root):
    with pytest.raises(RecordingError, match="seed_everything"):
        fit(Regressor(), loader(), TrajectoryRecorder(root), max_epochs=1)


def test_an_existing_run_is_kept(record, root):
    record(Regressor(), loader(), max_epochs=1)

    with pytest.raises(RecordingError, match=f"{root / 'run'} exists.*overwrite=True"):
        record(Regressor(), loader(), max_epochs=2)

    assert Run(root / "run").steps == 6


def test_an_existing_run_is_replaced_on_demand(record):
    record(Regressor(), loader(), max_epochs=2)

    run = record(Regressor(), loader(), max_epochs=1, recorder={"overwrite": True})

    assert run.steps == 6
    assert run.complete


def test_a_directory_that_is_no_run_is_never_overwritten(record, root):
    (root / "run").mkdir(parents=True)
    (root / "run" / "thesis.tex").write_text("years of work")

    with pytest.raises(RecordingError, match="is not a recorded run"):
        record(Regressor(), loader(), max_epochs=1, recorder={"overwrite": True})

    assert (root / "run" / "thesis.tex").exists()


def test_validation_alone_records_nothing(fit, root):
    class Validated(Regressor):
        def validation_step(self, batch, batch_idx):
            pass

    trainer = fit(Validated(), loader(), max_epochs=1)
    trainer.callbacks.append(TrajectoryRecorder(root, "run"))

    trainer.validate(Validated(), loader(), verbose=False)

    assert not root.exists()


class Logs(Regressor):
    """Logs a metric of the training, one of the validation, and one that is not a number."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log_dict({"val_loss": 10.0 + self.current_epoch, "val_ratio": float("nan")})


def test_a_run_knows_the_metrics_that_its_training_ended_with(fit, root):
    data = pl.LightningDataModule.from_datasets(IndexedExamples(), IndexedExamples(), batch_size=4)
    trainer = fit(Logs(), data, TrajectoryRecorder(root, run="run"), max_epochs=3)

    metrics = Run(root / "run").manifest.metrics

    assert metrics == {"train_loss": trainer.callback_metrics["train_loss"].item(), "val_loss": 12.0}
