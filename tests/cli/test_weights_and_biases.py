"""What every command logs to W&B with --wandb: one group of runs, with names and a lineage; read from offline files."""

from types import SimpleNamespace

import pytest
import yaml

from lightning_dtda.cli import main
from lightning_dtda.cli.weights_and_biases import logger_of
from tests.cli.configuration import CONFIG
from tests.reporting.wandb_log import Logged

pytest.importorskip("sklearn")


@pytest.fixture
def in_temporary_directory(tmp_path, monkeypatch):
    for name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    for name, value in {"MODE": "offline", "SILENT": "true", "ERROR_REPORTING": "false"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return tmp_path


@pytest.mark.slow
def test_every_command_logs_a_run_beside_those_of_the_seeds(in_temporary_directory):
    tmp_path = in_temporary_directory
    logger = {"class_path": "WandbLogger", "init_args": {"project": "demo", "save_dir": str(tmp_path)}}
    config = {**CONFIG, "trainer": {**CONFIG["trainer"], "logger": logger, "log_every_n_steps": 1}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    root, found, truth = (str(tmp_path / name) for name in ("diabetes", "found", "truth"))
    question = ["--ensemble", root, "--queries.indices=[0,1]"]
    main(["record", "--config", str(tmp_path / "config.yaml"), "--ensemble", root, "--seeds", "6"])
    main(["attribute", *question, "--output", found, "--wandb"])
    main(["report", "--attribution", found, "--output", str(tmp_path / "report.html"), "--wandb"])
    main(["retrain", *question, "--output", truth, "--subsets", "3", "--seeds", "4", "--wandb"])
    main(["evaluate", "--attribution", found, "--truth", truth, "--wandb"])
    main(["suggest", "--attribution", found, "--wandb"])
    logged = [Logged(tmp_path, path.stem.removeprefix("run-")) for path in tmp_path.glob("wandb/*run-*/*.wandb")]
    assert {(each.run.project, each.run.run_group) for each in logged} == {("demo", "diabetes")}
    kinds = [each.run.job_type for each in logged]
    others = {"retraining": 1, "evaluation": 1, "suggestion": 1}
    assert {kind: kinds.count(kind) for kind in kinds} == {"training": 6, "attribution": 2, **others}
    trainings = [each for each in logged if each.run.job_type == "training"]
    assert {each.run.display_name: each.config["seed"] for each in trainings} == {f"seed-000{n}": n for n in range(6)}
    inputs = {each.run.job_type: {*each.inputs} for each in logged}
    assert inputs == {
        "training": set(),
        "attribution": {"recording-diabetes"},
        "retraining": {"recording-diabetes"},
        "evaluation": {"attribution-diabetes", "truth-diabetes"},
        "suggestion": {"attribution-diabetes"},
    }
    for each in logged:
        if each.run.job_type == "attribution":
            final = [training.summary["val_loss"] for training in trainings]
            assert each.summary["seeds/val_loss/mean"] == pytest.approx(sum(final) / 6)


@pytest.mark.parametrize("loggers", [False, True, "TensorBoardLogger", [{"class_path": "CSVLogger"}]], ids=str)
def test_without_a_wandb_logger_the_environment_says_where_to(tmp_path, loggers):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"trainer": {"logger": loggers}}))
    assert logger_of(SimpleNamespace(root=tmp_path)) == {}


def test_the_environment_comes_before_the_logger_of_the_runs(tmp_path, monkeypatch):
    logger = {"class_path": "WandbLogger", "init_args": {"project": "mine", "entity": "team"}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"trainer": {"logger": [logger]}}))
    monkeypatch.delenv("WANDB_ENTITY", raising=False)
    monkeypatch.setenv("WANDB_PROJECT", "other")
    assert logger_of(SimpleNamespace(root=tmp_path)) == {"entity": "team"}
    monkeypatch.delenv("WANDB_PROJECT")
    assert logger_of(SimpleNamespace(root=tmp_path)) == {"project": "mine", "entity": "team"}
