"""Suggestions at the terminal."""

import pytest
import torch

from lightning_dtda import Attribution
from lightning_dtda.cli import main


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
    assert "6 runs that had no say in the choice" in out
    assert out.index(" 1 1 ") < out.index(" 2 2 ")
    assert "95% interval" in out


def test_effects_on_the_runs_that_chose_are_called_too_good(saved, capsys):
    main(["suggest", "--attribution", str(saved), "--held_out", "0"])
    assert "it is too good" in " ".join(capsys.readouterr().out.split())


def test_nothing_to_suggest_is_said(saved, capsys):
    main(["suggest", "--attribution", str(saved), "--goal", "improve_mean", "--caution", "2"])
    assert "No removal is predicted" in capsys.readouterr().out


def test_an_unknown_goal_is_refused(saved, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["suggest", "--attribution", str(saved), "--goal", "win"])
    assert stop.value.code == 2
