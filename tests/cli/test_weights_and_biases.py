"""Seeds and their attribution stand in one W&B group, each under its own name; read back from the offline logs."""

import pytest
import yaml

from lightning_dtda.cli import main
from tests.cli.configuration import CONFIG
from tests.reporting.wandb_log import read_records

pytest.importorskip("sklearn")


@pytest.mark.slow
def test_runs_and_summary_share_a_group_and_have_names(tmp_path, monkeypatch):
    for name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    for name, value in {"MODE": "offline", "SILENT": "true", "ERROR_REPORTING": "false"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    logger = {"class_path": "WandbLogger", "init_args": {"project": "demo", "save_dir": str(tmp_path)}}
    config = {**CONFIG, "trainer": {**CONFIG["trainer"], "logger": logger}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    root = str(tmp_path / "diabetes")
    main(["record", "--config", str(tmp_path / "config.yaml"), "--ensemble", root, "--seeds", "2"])
    main(["attribute", "--ensemble", root, "--output", str(tmp_path / "a"), "--queries.indices=[0]", "--wandb"])
    found = []
    for path in tmp_path.glob("wandb/offline-run-*/*.wandb"):
        run = next(record.run for record in read_records(path) if record.HasField("run"))
        found.append((run.project, run.run_group, run.job_type, run.display_name))
    trainings = [("demo", "diabetes", "training", f"seed-000{seed}") for seed in range(2)]
    assert sorted(found) == sorted([*trainings, ("demo", "diabetes", "attribution", "")])
