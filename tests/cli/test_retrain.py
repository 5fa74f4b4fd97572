"""Ground truth from the command line."""

import json

import pytest
import torch
import yaml

from lightning_dtda import Attribution, GroundTruth
from lightning_dtda.cli import main
from lightning_dtda.retraining import random_subsets

pytest.importorskip("sklearn")

CONFIG = {
    "model": {"class_path": "lightning_dtda.demo.diabetes.DiabetesRegressor", "init_args": {"width": 4}},
    "data": {"class_path": "lightning_dtda.demo.diabetes.DiabetesData"},
    "trainer": {"max_steps": 12, "accelerator": "cpu", "logger": False, "enable_checkpointing": False},
}
QUERIES = ["--queries.indices=[0,3]", "--measurement", "prediction"]


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return path


def test_random_subsets_are_trained_without_and_a_second_call_adds_seeds(config, tmp_path, capsys):
    output = tmp_path / "truth"
    common = ["retrain", "--config", str(config), "--output", str(output), *QUERIES, "--stacked", "false"]
    main([*common, "--subsets", "2", "--seeds", "2", "--baseline_seeds", "3"])
    assert "GroundTruth(2 subsets, 2 seeds, 2 queries, prediction, drop) is in" in capsys.readouterr().out
    truth = GroundTruth.load(output)
    examples = truth.about["data"]["length"]
    assert truth.removed == tuple(random_subsets(examples, 2, 0.9))
    assert (truth.queries, len(truth.baseline_seeds)) == ((0, 3), 3)
    assert truth.measurements.isfinite().all()
    main([*common, "--subsets", "2", "--seeds", "3", "--baseline_seeds", "3"])
    more = GroundTruth.load(output)
    assert torch.equal(more.measurements[:, :2], truth.measurements)


@pytest.mark.slow
def test_stacks_train_what_the_configuration_says(config, tmp_path):
    for choice in ("true", "false"):
        options = ["--subsets", "2", "--seeds", "3", "--stacked", choice, "--output", str(tmp_path / choice)]
        main(["retrain", "--config", str(config), *QUERIES, *options])
    stacked, trained = GroundTruth.load(tmp_path / "true"), GroundTruth.load(tmp_path / "false")
    assert stacked.about["engine"] == "stacked"
    # single precision, 12 steps
    torch.testing.assert_close(stacked.measurements, trained.measurements, rtol=1e-4, atol=1e-5)
    assert trained.measurements.std(1).min() > 1e-3


@pytest.mark.slow
def test_a_ray_cluster_trains_what_the_configuration_says(ray_cluster, config, tmp_path):
    question = ["--config", str(config), *QUERIES, "--subsets", "2", "--seeds", "2", "--stacked", "false"]
    for workers in (["RayCluster", "--workers.retries", "1"], ["1"]):
        main(["retrain", *question, "--output", str(tmp_path / workers[0]), "--workers", *workers])
    on_ray, trained = GroundTruth.load(tmp_path / "RayCluster"), GroundTruth.load(tmp_path / "1")
    assert torch.equal(on_ray.measurements, trained.measurements)


def test_recorded_runs_are_trained_again_and_reweighted(config, tmp_path):
    root, removed = tmp_path / "runs", tmp_path / "removed.json"
    removed.write_text(json.dumps([[1, 2], [7]]))
    main(["record", "--config", str(config), "--ensemble", str(root), "--seeds=[5,6]"])
    main(["attribute", "--ensemble", str(root), "--output", str(tmp_path / "attribution"), *QUERIES])
    attribution = Attribution.load(tmp_path / "attribution")
    common = ["retrain", "--ensemble", str(root), *QUERIES, "--removed", str(removed), "--seeds=[5,6]"]
    with pytest.warns(UserWarning, match="seeds that were recorded"):
        main([*common, "--output", str(tmp_path / "drop"), "--stacked", "false"])
    main([*common, "--output", str(tmp_path / "reweight"), "--removal", "reweight"])
    for removal in ("drop", "reweight"):
        truth = GroundTruth.load(tmp_path / removal)
        assert truth.removed == ((1, 2), (7,))
        # what was recorded is what a seed gives, everything kept
        torch.testing.assert_close(truth.baseline, attribution.baseline, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("content", "message"),
    [("[3, 4]", "is not a list of lists"), ("nonsense", "cannot be read"), ("[[1], []]", "Subset 1 is empty")],
)
def test_subsets_that_cannot_be_removed_are_refused_in_words(config, tmp_path, capsys, content, message):
    removed = tmp_path / "removed.json"
    removed.write_text(content)
    with pytest.raises(SystemExit) as stop:
        main(["retrain", "--config", str(config), "--output", str(tmp_path / "truth"), "--removed", str(removed)])
    assert stop.value.code == 1
    assert message in capsys.readouterr().err


def noisy(module, batch):
    """Measures with noise, one draw at a time."""
    found = module(batch[0])
    return (found + torch.randn_like(found)).flatten()


def test_draws_of_a_measurement_are_those_asked_for_in_both_commands(config, tmp_path):
    drawn = ["--measurement", f"{__name__}.noisy", "--queries.indices=[0,3]"]
    drawn += ["--measurement_draws", "3", "--measurement_seed", "5"]
    main(["record", "--config", str(config), "--ensemble", str(tmp_path / "runs"), "--seeds", "2"])
    main(["attribute", "--ensemble", str(tmp_path / "runs"), "--output", str(tmp_path / "attribution"), *drawn])
    reweighted = ["--removal", "reweight", "--subsets", "1", "--seeds=[0,1]"]
    main(["retrain", "--ensemble", str(tmp_path / "runs"), "--output", str(tmp_path / "truth"), *drawn, *reweighted])
    attribution, truth = Attribution.load(tmp_path / "attribution"), GroundTruth.load(tmp_path / "truth")
    assert attribution.about["draws"] == truth.about["draws"] == {"number": 3, "seed": 5}
    torch.testing.assert_close(truth.baseline, attribution.baseline, rtol=1e-5, atol=1e-6)
