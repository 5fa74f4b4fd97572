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


def printed(capsys):
    return " ".join(capsys.readouterr().out.split())


def test_the_verdict_comes_first_and_the_best_number_is_marked(saved, capsys):
    main(["suggest", "--attribution", str(saved), "--k", "2"])
    out = printed(capsys)
    # the second and the third example each take a part of the spread, exactly the same in every run
    assert out.startswith("Remove these 2 (1, 2): standard deviation of the loss over seeds \N{MINUS SIGN}60 % [")
    assert "6 runs not used for the choice" in out
    assert out.index(" 1 1 \N{MINUS SIGN}40 % ") < out.index(" 2 2 \N{MINUS SIGN}60 % ") < out.index("best")
    assert "[95% interval]" in out


def test_effects_on_the_runs_that_chose_are_called_too_good(saved, capsys):
    main(["suggest", "--attribution", str(saved), "--held_out", "0"])
    out = printed(capsys)
    assert "the effects are optimistic" in out
    assert out.startswith("No verdict without held-out runs: with the first 2, standard deviation")
    assert "on 12 runs that also chose." in out


def test_that_nothing_helps_is_said_first(saved, capsys):
    main(["suggest", "--attribution", str(saved), "--goal", "improve_mean", "--caution", "2"])
    assert printed(capsys).startswith("No removal is shown to help: none is predicted")
    main(["suggest", "--attribution", str(saved), "--goal", "improve_mean", "--caution", "0", "--verify"])
    out = printed(capsys)
    assert out.startswith("No removal is shown to help: at best, mean loss over seeds")
    assert "best " not in out.split("numbers of removals.")[1]  # no row is marked
    assert "Retrained" not in out


def test_more_removals_than_there_are_are_refused(saved, capsys):
    with pytest.raises(SystemExit):
        main(["suggest", "--attribution", str(saved), "--k", "4"])
    assert "k=4, but there are 3 removals. Give a k of at most 3" in capsys.readouterr().err
    main(["suggest", "--attribution", str(saved), "--k", "3"])


def test_an_unknown_goal_is_refused(saved, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["suggest", "--attribution", str(saved), "--goal", "win"])
    assert stop.value.code == 2


def test_options_of_retrain_without_verify_are_refused(saved, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["suggest", "--attribution", str(saved), "--seeds", "3"])
    assert stop.value.code == 2
    assert "unrecognized: --seeds 3" in capsys.readouterr().err


@pytest.mark.slow
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
    suggest = ["suggest", "--attribution", str(tmp_path / "attribution"), "--goal", "improve_mean", "--held_out=0"]
    main([*suggest, "--verify", "--ensemble", str(root), "--output", str(truth), "--seeds", "4", "--stacked", "false"])
    out = " ".join(capsys.readouterr().out.split())
    suggestion = suggest_removals(Attribution.load(tmp_path / "attribution"), "improve_mean", held_out=0)
    assert suggestion.best
    assert f"Retrained 4 times without the {suggestion.best} examples and 4 times with them." in out
    found = GroundTruth.load(truth)
    assert found.removed == (tuple(sorted(suggestion.removed)),)
    assert found.queries == (4, 0)
    # by hand: the mean over seeds, averaged over queries, of what was measured
    change = float((found.measurements[0].mean(0) - found.baseline.mean(0)).mean())
    assert verify(suggestion, found).effect == pytest.approx(change, rel=1e-5)


def test_queries_are_given_by_their_indices(tmp_path, capsys):
    x = torch.stack([torch.linspace(-1, 1, 12), torch.linspace(2, 0, 12)], 1)
    responses = torch.stack([0.3 * x, -0.4 * x.flip(1), -0.2 * x], -1)
    attribution = Attribution(x, responses, tuple(map(str, range(12))), (5, 3), {"measurement": "loss"})
    attribution.save(tmp_path / "saved")
    suggest = ["suggest", "--attribution", str(tmp_path / "saved")]
    for queries, positions in (("--queries=[3]", [1]), ("--queries=5", [0]), ("--queries=[3,5]", [1, 0])):
        main([*suggest, queries])
        assert suggest_removals(attribution, queries=positions).verdict in printed(capsys)
    with pytest.raises(SystemExit):
        main([*suggest, "--queries=0"])
    assert "--queries has 0; the queries of the attribution are 5, 3." in capsys.readouterr().err
