"""Suggestions at the terminal."""

import pytest
import torch
import yaml

from lightning_dtda import Attribution, GroundTruth, suggest_removals
from lightning_dtda.cli import main
from lightning_dtda.evaluation import verify


@pytest.fixture
def saved(tmp_path):
    x = torch.linspace(-1, 1, 12)[:, None]
    responses = torch.stack([0.3 * x, -0.4 * x, -0.2 * x], -1)
    runs = tuple(f"seed-{s:04d}" for s in range(12))
    Attribution(x, responses, runs, (0,), {"measurement": "loss"}).save(tmp_path / "saved")
    return tmp_path / "saved"


def test_the_table_has_the_removals_in_order_and_says_of_what_runs(saved, capsys):
    main(["suggest", "--attribution", str(saved), "--k", "2"])
    out = " ".join(capsys.readouterr().out.split())
    assert "variance of the loss over seeds" in out
    assert "6 runs not used for the choice" in out
    assert out.index(" 1 1 ") < out.index(" 2 2 ")
    assert "95% interval" in out


def test_effects_on_the_runs_that_chose_are_called_too_good(saved, capsys):
    main(["suggest", "--attribution", str(saved), "--held_out", "0"])
    assert "the effects are optimistic" in " ".join(capsys.readouterr().out.split())


def test_nothing_to_suggest_is_said(saved, capsys):
    main(["suggest", "--attribution", str(saved), "--goal", "improve_mean", "--caution", "2"])
    assert "No removal is predicted" in capsys.readouterr().out


def test_an_unknown_goal_is_refused(saved, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["suggest", "--attribution", str(saved), "--goal", "win"])
    assert stop.value.code == 2


def test_options_of_retrain_without_verify_are_refused(saved, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["suggest", "--attribution", str(saved), "--seeds", "3"])
    assert stop.value.code == 2
    assert "unrecognized: --seeds 3" in capsys.readouterr().err


def test_a_suggestion_is_verified_by_retraining(tmp_path, capsys):
    pytest.importorskip("sklearn")
    config, root = tmp_path / "config.yaml", tmp_path / "runs"
    config.write_text(
        yaml.safe_dump(
            {
                "model": {"class_path": "lightning_dtda.demo.diabetes.DiabetesRegressor", "init_args": {"width": 4}},
                "data": {"class_path": "lightning_dtda.demo.diabetes.DiabetesData"},
                "trainer": {"max_steps": 12, "accelerator": "cpu", "logger": False, "enable_checkpointing": False},
            }
        )
    )
    main(["record", "--config", str(config), "--ensemble", str(root), "--seeds", "6"])
    question = ["--queries.indices=[4,0]", "--measurement", "prediction"]
    main(["attribute", "--ensemble", str(root), "--output", str(tmp_path / "attribution"), *question])
    capsys.readouterr()
    truth = tmp_path / "truth"
    suggest = ["suggest", "--attribution", str(tmp_path / "attribution"), "--k", "3", "--caution=0"]
    main([*suggest, "--verify", "--ensemble", str(root), "--output", str(truth), "--seeds", "4", "--stacked", "false"])
    out = " ".join(capsys.readouterr().out.split())
    assert "Retrained 4 times without the 3 examples and 4 times with them." in out
    found = GroundTruth.load(truth)
    suggestion = suggest_removals(Attribution.load(tmp_path / "attribution"), k=3, caution=0)
    assert found.removed == (tuple(sorted(suggestion.removed)),)
    assert found.queries == (4, 0)
    # by hand: the variance over seeds, averaged over queries, of what was measured
    change = float((found.measurements[0].var(0) - found.baseline.var(0)).mean())
    assert verify(suggestion, found).effect == pytest.approx(change, rel=1e-5)
