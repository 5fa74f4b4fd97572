"""An ensemble holds complete runs of one configuration: samples of one distribution."""

import warnings

import pytest

from lightning_dtda import Ensemble
from lightning_dtda.errors import TrajectoryError
from tests.trajectory.runs import STEPS, manifest, write_run

SAME = manifest().configuration


def test_runs_come_in_the_order_of_their_names(tmp_path):
    for seed in (2, 0, 1):
        write_run(tmp_path / f"seed-{seed:04d}", seed, seed=seed)

    ensemble = Ensemble.open(tmp_path)

    assert [run.name for run in ensemble] == ["seed-0000", "seed-0001", "seed-0002"]
    assert len(ensemble) == 3
    assert ensemble.examples == 10
    assert [run.name for run in ensemble[1:]] == ["seed-0001", "seed-0002"]
    assert ensemble[-1].manifest.seed == 2
    assert repr(ensemble) == f"Ensemble({str(tmp_path)!r}, runs=3, steps=[7])"


def test_complete_runs_are_opened_without_a_warning(tmp_path):
    write_run(tmp_path / "run")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Ensemble.open(tmp_path)


def test_incomplete_runs_are_left_out_and_named_with_the_reason(tmp_path):
    write_run(tmp_path / "whole")
    write_run(tmp_path / "failed", status="incomplete", reason="ValueError: the loss is not finite")
    write_run(tmp_path / "killed", status="recording")

    with pytest.warns(UserWarning, match="left out") as caught:
        ensemble = Ensemble.open(tmp_path)

    [warning] = caught
    assert f"failed ({STEPS} steps, ValueError: the loss is not finite)" in str(warning.message)
    assert f"killed ({STEPS} steps, still recording or killed)" in str(warning.message)
    assert warning.filename == __file__
    assert [run.name for run in ensemble] == ["whole"]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        (
            {"configuration": {**SAME, "training": {**SAME["training"], "batch_size": 4}}},
            "training.batch_size: 2 vs. 4",
        ),
        ({"configuration": {**SAME, "dataset": {**SAME["dataset"], "length": 9}}}, "dataset.length: 10 vs. 9"),
        ({"configuration": {**SAME, "more": True}}, "more: 'absent' vs. True"),
        ({"evaluation_modules": ["norm"]}, r"evaluation_modules: \[\] vs. \['norm'\]"),
        ({"options": [{"nesterov": True}] * 2}, "options"),
        ({"dtype": "float64"}, "dtype: 'float32' vs. 'float64'"),
    ],
)
def test_runs_of_different_configurations_are_refused_with_what_differs(tmp_path, changes, field):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", **changes)

    with pytest.raises(TrajectoryError, match=f"(?s){tmp_path / 'b'}.*{field}.*Keep each configuration"):
        Ensemble.open(tmp_path)


def test_runs_may_differ_in_what_is_no_part_of_the_distribution(tmp_path):
    write_run(tmp_path / "a")
    write_run(
        tmp_path / "b", draw=1, seed=8, threads=4, versions={"torch": "2.4"}, gradients="none", with_gradients=False
    )

    assert len(Ensemble.open(tmp_path)) == 2


def test_a_root_that_is_no_directory_is_refused(tmp_path):
    with pytest.raises(TrajectoryError, match="not a directory"):
        Ensemble.open(tmp_path / "absent")


def test_a_root_without_a_complete_run_is_refused_with_what_to_do(tmp_path):
    write_run(tmp_path / "killed", status="recording")

    with (
        pytest.warns(UserWarning, match="killed"),
        pytest.raises(TrajectoryError, match=r"no complete run. Record some"),
    ):
        Ensemble.open(tmp_path)
