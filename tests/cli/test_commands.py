"""The command line from configuration to attribution, in process."""

import json
import logging
import os
import re
from typing import get_args

import pytest
import torch
import yaml

from lightning_dtda import Attribution, Ensemble, attribute
from lightning_dtda.attribution.exporting import Format
from lightning_dtda.cli import main
from lightning_dtda.cli.configuration_cli import save_configuration
from lightning_dtda.cli.export import FORMATS
from lightning_dtda.demo.diabetes import DiabetesData, DiabetesRegressor
from lightning_dtda.errors import DTDAError
from lightning_dtda.reporting import print_summary
from lightning_dtda.trajectory.storage import read_json, write_json
from tests.cli.configuration import CONFIG

pytest.importorskip("sklearn")


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return path


@pytest.fixture
def record(config, tmp_path):
    def _record(*arguments):
        main(["record", "--config", str(config), "--ensemble", str(tmp_path / "runs"), *arguments])
        return tmp_path / "runs"

    return _record


def test_seeds_are_recorded_skipped_when_complete_and_redone_when_not(record, capsys):
    root = record("--seeds", "2")
    assert [run.name for run in Ensemble.open(root)] == ["seed-0000", "seed-0001"]
    manifest = root / "seed-0001" / "manifest.json"
    write_json(manifest, read_json(manifest) | {"status": "recording"})
    before = (root / "seed-0000" / "manifest.json").stat().st_mtime_ns
    record("--seeds", "3")
    assert "1 of 3 runs are already complete" in capsys.readouterr().out
    assert [run.name for run in Ensemble.open(root)] == ["seed-0000", "seed-0001", "seed-0002"]
    assert (root / "seed-0000" / "manifest.json").stat().st_mtime_ns == before


def test_a_seed_gives_the_same_run_whatever_was_trained_before_it(record, config, tmp_path):
    root = record("--seeds=[0,1]")
    main(["record", "--config", str(config), "--ensemble", str(tmp_path / "alone"), "--seeds=[1]"])
    for name, expected in Ensemble.open(root)[1].theta(12).items():
        assert torch.equal(Ensemble.open(tmp_path / "alone")[0].theta(12)[name], expected)


def test_a_configuration_that_is_there_is_left_alone_for_workers_that_read_it(tmp_path):
    save_configuration(tmp_path, CONFIG)
    path = tmp_path / "config.yaml"
    before = path.stat().st_mtime_ns
    save_configuration(tmp_path, CONFIG | {"seed_everything": 3})
    assert path.stat().st_mtime_ns == before


@pytest.mark.parametrize("content", ["[1, 2", "- 1", "\0", "pipe", "[" * 5000])
def test_a_configuration_that_cannot_be_read_is_named_and_may_be_deleted(tmp_path, content):
    path = tmp_path / "config.yaml"
    os.mkfifo(path) if content == "pipe" else path.write_text(content, encoding="utf-8")
    with pytest.raises(DTDAError, match=f"(?s){path} cannot be read .*Delete it"):
        save_configuration(tmp_path, CONFIG)
    path.unlink()
    save_configuration(tmp_path, CONFIG)
    save_configuration(tmp_path, CONFIG)


@pytest.mark.slow
def test_processes_record_the_same_runs_in_parallel(record, config, tmp_path):
    root = record("--seeds", "3")
    main(["record", "--config", str(config), "--ensemble", str(tmp_path / "there"), "--seeds", "3", "--workers", "2"])
    logs = [(tmp_path / "there" / "logs" / f"seed-000{seed}.log").read_text() for seed in range(3)]
    # one of them makes sure that the runs of all fit
    assert ["Recording 3 runs" in log for log in logs] == [True, False, False]
    for one, other in zip(Ensemble.open(root), Ensemble.open(tmp_path / "there"), strict=True):
        for name, expected in one.theta(12).items():
            torch.testing.assert_close(other.theta(12)[name], expected)


@pytest.mark.slow
def test_stacked_seeds_are_the_same_runs(record, config, tmp_path, capsys):
    root = record("--seeds", "2")
    record("--seeds", "5", "--stacked", "true")
    output = capsys.readouterr().out
    assert "2 of 5 runs are already complete" in output
    assert "5 of 5 runs are complete in" in output
    trained = tmp_path / "trained"
    main(["record", "--config", str(config), "--ensemble", str(trained), "--seeds", "5"])
    for one, other in zip(Ensemble.open(root), Ensemble.open(trained), strict=True):
        assert other.name == one.name
        assert other.manifest.comparable == one.manifest.comparable
        for step in range(13):
            # a dozen steps in single precision, summed in another order
            torch.testing.assert_close(one.theta_vector(step), other.theta_vector(step), rtol=1e-5, atol=1e-6)
            assert step == 12 or torch.equal(one.batch_indices(step), other.batch_indices(step))


def test_what_cannot_be_stacked_is_an_error_that_names_the_way_out(record, capsys):
    with pytest.raises(SystemExit, match="1"):
        record("--seeds", "3", "--stacked", "true", "--trainer.precision=bf16-mixed")
    assert "the Trainer has precision='bf16-mixed'. These trainings cannot be stacked" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="1"):
        record("--seeds", "3", "--stacked", "true", "--workers", "2")
    assert "Leave out workers or stacked" in capsys.readouterr().err


@pytest.mark.slow
def test_what_fails_in_a_process_is_reported_with_its_log(record, config, tmp_path, capsys):
    with pytest.raises(SystemExit, match="1"):
        record("--seeds", "2", "--workers", "2", "--trainer.devices", "2")
    output = capsys.readouterr().out
    for seed in range(2):
        assert f"seed {seed} failed: RecordingError: The Trainer spreads a training over 2 processes" in output
        assert str(tmp_path / "runs" / "logs" / f"seed-000{seed}.log") in output


@pytest.mark.slow
def test_ray_records_the_same_runs(ray_cluster, record, config, tmp_path, capsys):
    root = record("--seeds", "3")
    arguments = ["--config", str(config), "--ensemble", str(tmp_path / "ray"), "--workers", "RayCluster"]
    main(["record", *arguments, "--seeds", "3", "--recorder.checkpoint_every", "3"])
    assert "3 of 3 runs are complete" in capsys.readouterr().out
    for one, other in zip(Ensemble.open(root), Ensemble.open(tmp_path / "ray"), strict=True):
        assert other.name == one.name
        assert [checkpoint["step"] for checkpoint in other.manifest.checkpoints] == [0, 3, 6, 9, 12]
        for name, expected in one.theta(12).items():
            torch.testing.assert_close(other.theta(12)[name], expected)


@pytest.mark.slow
def test_ray_refuses_a_training_of_several_processes(ray_cluster, record, capsys):
    # it would start the worker's program once more
    with pytest.raises(SystemExit, match="1"):
        record("--workers", "RayCluster", "--seeds", "1", "--trainer.devices", "2")
    assert "seed 0 failed: RecordingError: The Trainer spreads a training over 2 processes" in capsys.readouterr().out


def test_one_bad_seed_does_not_lose_the_others(record, capsys, monkeypatch):
    original = DiabetesRegressor.training_step

    def training_step(self, batch, batch_idx):
        if torch.initial_seed() == 1 and self.global_step == 5:
            raise RuntimeError("bad luck")
        return original(self, batch, batch_idx)

    monkeypatch.setattr(DiabetesRegressor, "training_step", training_step)
    with pytest.raises(SystemExit) as stop:
        record("--seeds", "3")
    assert stop.value.code == 1
    output = capsys.readouterr()
    assert "seed 1 failed: RuntimeError: bad luck" in output.out
    assert "bad luck" in output.err


def test_what_fails_for_all_seeds_ends_the_command(record, capsys, monkeypatch):
    original = DiabetesRegressor.training_step

    def training_step(self, batch, batch_idx):
        if self.global_step == 5:
            raise RuntimeError("no such column")
        return original(self, batch, batch_idx)

    monkeypatch.setattr(DiabetesRegressor, "training_step", training_step)
    with pytest.raises(SystemExit, match="1"):
        record("--seeds", "20")
    written = capsys.readouterr().err
    assert "error: Seeds 0 and 1 failed for the same reason, so no others were tried: RuntimeError: no such" in written
    assert written.count("Traceback") == 1


def test_a_configuration_that_lightning_rejects_is_one_line(record, capsys):
    with pytest.raises(SystemExit, match="1"):
        record("--seeds", "3", "--trainer.limit_train_batches=-1")
    written = capsys.readouterr().err
    assert "Lightning rejects the configuration: " in written
    assert "Traceback" not in written


@pytest.mark.parametrize(
    ("command", "wrong", "code", "message"),
    [
        ("record", ["--model", "lightning_dtda.demo.diabetes.DiabetesRegresor"], 2, "Did you mean DiabetesRegressor?"),
        ("record", ["--model", "lightning_dtda.demo.diabetes.DiabetesRegresor.x"], 2, "Problem with given class_path"),
        ("record", ["--model", "no_such_module.Net"], 2, "No module named 'no_such_module'"),
        ("record", ["--model.init_args.widht", "3"], 2, "widht"),
        ("record", ["--config", "no-such-file.yaml"], 2, "no-such-file.yaml'"),
        ("attribute", ["--estimator", "Sorce"], 2, "Did you mean Source?"),
        ("attribute", ["--measurement", "los"], 1, "Did you mean loss?"),
        ("attribute", ["--differences", "mean", "varience"], 1, "Did you mean variance?"),
    ],
)
def test_a_wrong_name_is_an_error_without_a_traceback_before_the_work(
    record, config, tmp_path, capsys, monkeypatch, command, wrong, code, message
):
    arguments = {
        "record": ["--config", str(config), "--ensemble", str(tmp_path / "runs")],
        "attribute": ["--ensemble", str(tmp_path / "runs"), "--output", str(tmp_path / "answer")],
    }
    if command == "attribute":
        record("--seeds", "1")
    with pytest.raises(SystemExit) as stop:
        main([command, *arguments[command], *wrong])
    assert stop.value.code == code
    written = capsys.readouterr().err
    assert message in written
    assert "Traceback" not in written
    assert not (tmp_path / "answer").exists()


def test_another_configuration_is_not_recorded_into_the_same_ensemble(record, capsys):
    record("--seeds", "1")
    with pytest.raises(SystemExit):
        record("--seeds", "2", "--model.init_args.width=8")
    assert "model.init_args.width: 4 there, 8 now" in capsys.readouterr().err


def test_a_refused_configuration_does_not_stand_in_the_way_of_the_next(record, capsys):
    with pytest.raises(SystemExit):
        record("--seeds", "1", "--trainer.gradient_clip_val=0.5", "--trainer.precision=bf16-true")
    assert [run.name for run in Ensemble.open(record("--seeds", "1"))] == ["seed-0000"]


def test_a_run_without_all_its_files_is_recorded_again(record, capsys):
    root = record("--seeds", "1")
    (root / "seed-0000" / "steps-00000000.safetensors").unlink()
    assert Ensemble.open(record("--seeds", "1"))[0].steps == 12


def test_a_run_of_another_version_is_not_recorded_over(record, capsys):
    manifest = record("--seeds", "1") / "seed-0000" / "manifest.json"
    write_json(manifest, read_json(manifest) | {"format_version": 99})
    with pytest.raises(SystemExit):
        record("--seeds", "1")
    assert "format version 99" in capsys.readouterr().err
    assert read_json(manifest)["format_version"] == 99


def test_a_training_without_steps_is_not_called_complete(record, capsys):
    with pytest.raises(SystemExit):
        record("--seeds", "1", "--trainer.max_steps=0")
    assert "0 of 1 runs are complete" in capsys.readouterr().out


def test_attribute_finds_the_ensembles_own_configuration(record, tmp_path, capsys):
    root = record("--seeds", "3")
    main(["attribute", "--ensemble", str(root), "--output", str(tmp_path / "answer"), "--queries.indices=[3,1]"])
    assert "There are only 3 runs" in " ".join(capsys.readouterr().out.split())
    found = Attribution.load(tmp_path / "answer")
    data = DiabetesData()
    data.setup("fit")
    expected = attribute(
        Ensemble.open(root),
        DiabetesRegressor(width=4),
        data,
        queries=torch.utils.data.Subset(data.validation, [3, 1]),
        progress=False,
    )
    assert found.queries == (3, 1)
    torch.testing.assert_close(found.responses, expected.responses, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_attribute_shares_runs_out_to_processes(record, tmp_path):
    question = ["--ensemble", str(record("--seeds", "3")), "--queries.indices=[3,1]", "--estimator.runs_per_batch", "1"]
    for output, *options in (["here"], ["there", "--workers", "2"]):
        main(["attribute", *question, "--output", str(tmp_path / output), *options])
    here, there = (Attribution.load(tmp_path / output) for output in ("here", "there"))
    # the same batches of runs, with one thread: to the bit
    assert torch.equal(there.responses, here.responses)
    assert there.runs == here.runs


def test_several_dampings_are_not_shared_out(record, tmp_path, capsys):
    question = ["--ensemble", str(record("--seeds", "1")), "--output", str(tmp_path / "grid"), "--workers", "2"]
    with pytest.raises(SystemExit):
        main(["attribute", *question, "--estimator", "InfluenceFunctions", "--dampings=[0.1]"])
    assert "Leave out workers" in capsys.readouterr().err


def test_attribute_keeps_the_top(record, tmp_path, capsys):
    root, question = str(record("--seeds", "3")), ["--queries.indices=[3,1]", "--estimator", "InfluenceFunctions"]
    for output, *options in (["all"], ["top", "--keep_top", "4", "--scratch_budget", "1e-5"]):
        main(["attribute", "--ensemble", root, *question, "--output", str(tmp_path / output), *options])
    printed = capsys.readouterr().out
    everything, kept = (Attribution.load(tmp_path / output) for output in ("all", "top"))
    assert kept.about["keep_top"] == 4
    with pytest.warns(UserWarning, match="Influences of 3 runs"):
        assert kept.top(4)["example"].tolist() == everything.top(4)["example"].tolist()
    main(["report", "--attribution", str(tmp_path / "top"), "--output", str(tmp_path / "report.html")])
    assert printed.count("\n3  ") == 2  # the row of query 3 in the tables of both
    with pytest.raises(SystemExit):
        main(["attribute", "--ensemble", root, *question, "--output", root, "--keep_top", "4", "--dampings=[0.1]"])
    assert "Leave out keep_top" in capsys.readouterr().err


@pytest.mark.slow
def test_attribute_takes_a_ray_cluster(ray_cluster, record, tmp_path):
    question = ["--ensemble", str(record("--seeds", "2")), "--queries.indices=[3,1]"]
    options = ["--workers", "RayCluster", "--workers.retries", "1", "--estimator.runs_per_batch", "1"]
    main(["attribute", *question, "--output", str(tmp_path / "there"), *options])
    main(["attribute", *question, "--output", str(tmp_path / "here"), "--estimator.runs_per_batch", "1"])
    there, here = (Attribution.load(tmp_path / output) for output in ("there", "here"))
    torch.testing.assert_close(there.responses, here.responses, rtol=0, atol=0)


def test_estimator_measurement_and_split_are_options(record, tmp_path):
    root = record("--seeds", "2")
    question = ["--measurement", "prediction", "--queries.split", "train", "--queries.indices=[0]"]
    estimator = ["--estimator", "UnrolledDifferentiation", "--estimator.precision", "float64"]
    main(["attribute", "--ensemble", str(root), "--output", str(tmp_path / "answer"), *question, *estimator])
    found = Attribution.load(tmp_path / "answer")
    assert found.responses.dtype == torch.float64
    assert found.about["estimator"]["precision"] == "float64"
    assert found.measurement == "prediction"


def test_several_dampings_are_answered_from_one_fit(record, tmp_path, capsys):
    root = record("--seeds", "2")
    arguments = ["attribute", "--ensemble", str(root), "--output", str(tmp_path / "grid"), "--queries.indices=[3,1]"]
    influence = ["--estimator", "InfluenceFunctions", "--estimator.curvature", "GaussNewton"]
    main([*arguments, *influence, "--dampings=[0.1,auto]"])
    first, automatic = (Attribution.load(tmp_path / "grid" / f"damping-{damping}") for damping in ("0.1", "auto"))
    assert not torch.allclose(first.responses, automatic.responses)
    alone = [*arguments[:3], "--output", str(tmp_path / "alone"), "--queries.indices=[3,1]", *influence]
    main([*alone, "--estimator.curvature.damping", "0.1"])
    found = Attribution.load(tmp_path / "alone")
    torch.testing.assert_close(found.responses, first.responses, rtol=1e-5, atol=1e-7)
    assert found.about["estimator"] == first.about["estimator"]
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main([*arguments, *influence, "--dampings=[0.1]", "--measurement", "prediction"])
    assert "damping-0.1 holds the answer to another question" in " ".join(capsys.readouterr().err.split())


def test_an_estimator_s_curvature_is_an_option_too(record, tmp_path):
    root = record("--seeds", "2")
    question = ["--ensemble", str(root), "--measurement", "prediction", "--queries.indices=[0]"]
    estimator = ["--estimator", "Source", "--estimator.curvature", "GaussNewton"]
    for segments in ("2", "[1, 3]"):
        output = str(tmp_path / f"answer-{segments[0]}")
        arguments = [f"--estimator.segments={segments}", "--estimator.curvature.cutoff", "1e-5"]
        main(["attribute", *question, "--output", output, *estimator, *arguments])
        found = Attribution.load(output)
        assert found.about["estimator"]["segments"] == json.loads(segments)
        assert found.about["estimator"]["curvature"]["cutoff"] == 1e-5
        assert bool(found.responses.any())


def test_groups_are_read_from_a_file_and_a_step_is_asked_for(record, tmp_path, capsys):
    root = record("--seeds", "2")
    groups = {"old": [0, 5, 9], "young": [1]}
    (tmp_path / "groups.json").write_text(json.dumps(groups))
    question = ["--ensemble", str(root), "--queries.indices=[3,1]"]
    arguments = ["--removals", str(tmp_path / "groups.json"), "--step", "7", "--verbose"]
    main(["attribute", *question, "--output", str(tmp_path / "groups"), *arguments])
    output = " ".join(capsys.readouterr().out.split())
    assert "if one of 2 groups of training examples is removed?" in output
    assert "was measured after step 7 of 2 seeded runs" in output
    assert "old (3)" in output
    found = Attribution.load(tmp_path / "groups")
    assert (found.removals, found.members, found.step) == (("old", "young"), ((0, 5, 9), (1,)), 7)

    main(["attribute", *question, "--output", str(tmp_path / "single"), "--removals", "leave-one-out", "--step", "7"])
    single = Attribution.load(tmp_path / "single")
    assert single.removals is None
    expected = torch.stack([single.responses[..., group].sum(-1) for group in groups.values()], -1)
    torch.testing.assert_close(found.responses, expected, rtol=1e-4, atol=1e-6)


def test_examples_are_shown_by_a_function_and_queries_by_their_names(record, tmp_path, capsys, monkeypatch):
    root = record("--seeds", "2")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_showing.py").write_text("def show(item):\n    return f'{len(item[0])} measurements'\n")
    (tmp_path / "names.json").write_text(json.dumps(["the first", "the second"]))
    question = ["attribute", "--ensemble", str(root), "--queries.indices=[3,1]", "--output", "answer"]
    question += ["--estimator", "GradientDot"]
    main([*question, "--show", "my_showing.show", "--query_names", "names.json"])
    gallery = Attribution.load("answer").gallery
    assert [(shown.name, shown.text) for shown in gallery.queries.values()] == [
        ("the first", "10 measurements"),
        ("the second", "10 measurements"),
    ]
    assert all("over 2 runs" in shown.prediction for shown in gallery.queries.values())
    main([*question, "--query_names=[a,b]"])
    gallery = Attribution.load("answer").gallery
    assert [(shown.name, len(shown.fields)) for shown in gallery.queries.values()] == [("a", 10), ("b", 10)]
    for wrong, message in (
        (["--query_names", "none.json"], "--query_names none.json cannot be read"),
        (["--query_names=[a]"], "query_names has 1 names for 2 queries. Give one for each"),
        (["--show", "my_showing.no"], "show='my_showing.no' is not the import path of a function"),
    ):
        with pytest.raises(SystemExit) as stop:
            main([*question, *wrong])
        assert stop.value.code == 1
        assert message in capsys.readouterr().err


def test_predictions_take_a_scale_and_groups_are_removed_exactly(record, tmp_path, capsys):
    root = record("--seeds", "2")
    (tmp_path / "groups.json").write_text(json.dumps([list(range(40))]))
    question = ["--ensemble", str(root), "--queries.indices=[3,1]", "--removals", str(tmp_path / "groups.json")]
    main(["attribute", *question, "--output", str(tmp_path / "linear"), "--scale", "sqrt", "--verbose"])
    assert 'on the scale "sqrt"' in " ".join(capsys.readouterr().out.split())
    rooted = Attribution.load(tmp_path / "linear")
    # the training step returns a mean squared error
    assert (rooted.scale, rooted.known_range) == ("sqrt", (0.0, float("inf")))
    main(["attribute", *question, "--output", str(tmp_path / "exact"), "--estimator", "ExactRemoval"])
    exact = Attribution.load(tmp_path / "exact")
    assert not exact.out_of_range().any()
    change = exact.influence("mean")
    assert 0 < float((rooted.influence("mean") - change).norm() / change.norm()) < 0.5


@pytest.mark.parametrize(
    ("removals", "content", "message"),
    [
        ("column:1", None, "removals='column:1': the label of example 0 is"),
        ("no.json", None, "no.json cannot be read"),
        ("broken.json", "[[1, 2", "broken.json cannot be read"),
        ("number.json", "3", "number.json contains 3. It must be a list of lists"),
        ("empty.json", "[[]]", "Group '0' of removals is empty"),
    ],
)
def test_removals_that_cannot_be_are_refused_in_words(
    record, tmp_path, capsys, monkeypatch, removals, content, message
):
    root = record("--seeds", "1")
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / removals).write_text(content)
    with pytest.raises(SystemExit) as stop:
        main(["attribute", "--ensemble", str(root), "--output", str(tmp_path / "answer"), "--removals", removals])
    assert stop.value.code == 1
    assert message in capsys.readouterr().err


def test_check_says_in_words_whether_an_ensemble_can_be_trusted(record, capsys, monkeypatch):
    root = record("--seeds", "4")
    monkeypatch.setattr("lightning_dtda.evaluation.self_checks.RELIABLE", 0.0)  # of 12 steps, and 4 runs
    main(["check", "--ensemble", str(root), "--queries.indices=[0,1]", "--examples", "1"])
    text = " ".join(capsys.readouterr().out.split())
    assert "passed finite differences: relative error" in text
    assert "1 examples and 2 queries of seed-0000" in text
    assert "metasmoothness:" in text
    monkeypatch.setattr("lightning_dtda.evaluation.checking._AGREEMENT", 0.0)
    with pytest.raises(SystemExit) as stop:
        main(["check", "--ensemble", str(root), "--queries.indices=[0,1]", "--examples", "1"])
    assert stop.value.code == 1
    assert "failed finite differences" in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
def test_check_says_which_estimator_predicts_replays_best(record, capsys, monkeypatch):
    root = record("--seeds", "2")
    monkeypatch.setattr("lightning_dtda.evaluation.checking._AGREEMENT", float("inf"))
    compared = "[UnrolledDifferentiation, {class_path: InfluenceFunctions, init_args: {curvature: Identity}}]"
    question = ["check", "--ensemble", str(root), "--queries.indices=[0,1]", "--examples", "1", "--sets", "4"]
    main([*question, "--estimators", compared])
    text = " ".join(capsys.readouterr().out.split())
    assert "predicted and real mean influence over 4 random tenths" in text
    assert "] UnrolledDifferentiation, " in text
    assert "] InfluenceFunctions(Identity), " in text
    assert re.search(r"(Use|None of|cannot tell)", text)


def test_a_configuration_printed_can_be_used_again(config, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["record", "--config", str(config), "--ensemble", str(tmp_path / "runs"), "--print_config"])
    assert stop.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["init_args"]["width"] == 4
    assert printed["recorder"]["checkpoint_every"] == "sqrt"
    (tmp_path / "printed.yaml").write_text(yaml.safe_dump(printed))
    main(["record", "--config", str(tmp_path / "printed.yaml"), "--seeds", "1"])
    assert len(Ensemble.open(tmp_path / "runs")) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds=[1,1]"], "must give at least one seed"),
        (["--ckpt_path", "last"], "ckpt_path is set"),
        (
            ["--trainer.callbacks+=lightning_dtda.TrajectoryRecorder", "--trainer.callbacks.root=x", "--seeds", "1"],
            "contains a TrajectoryRecorder",
        ),
    ],
    ids=["seeds", "ckpt_path", "recorder"],
)
def test_what_cannot_be_recorded_is_refused_in_words(record, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        record(*arguments)
    assert stop.value.code == 1
    output = capsys.readouterr()
    assert message in output.err + output.out


def test_an_ensemble_of_a_script_needs_a_configuration(tmp_path, capsys):
    (tmp_path / "runs").mkdir()
    with pytest.raises(SystemExit):
        main(["attribute", "--ensemble", str(tmp_path / "runs"), "--output", str(tmp_path / "answer")])
    assert "Give --config" in capsys.readouterr().err


def test_queries_out_of_range_are_refused(record, tmp_path, capsys):
    root = record("--seeds", "1")
    with pytest.raises(SystemExit):
        main(["attribute", "--ensemble", str(root), "--output", str(tmp_path / "a"), "--queries.indices=[500]"])
    assert "the validation split has the examples 0 to 88" in capsys.readouterr().err


def test_a_split_that_the_data_module_lacks_is_refused(record, tmp_path, capsys):
    root = record("--seeds", "1")
    with pytest.raises(SystemExit):
        main(["attribute", "--ensemble", str(root), "--output", str(tmp_path / "a"), "--queries.split", "test"])
    assert "DiabetesData has no test_dataloader" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], *([each, "--help"] for each in ("report", "export", "evaluate", "demo"))]
)
def test_help_needs_no_lightning(arguments):
    import subprocess
    import sys

    code = f"import sys; from lightning_dtda.cli import main\ntry: main({arguments})\nexcept SystemExit: pass\n"
    code += "assert 'torch' not in sys.modules and 'lightning' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_command_is_an_error(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["atribute"])
    assert stop.value.code == 2
    assert "no command 'atribute'. Did you mean attribute?" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["record", "attribute", "retrain", "check", "plan"])
def test_help_is_on_a_command_s_own_options_and_help_all_on_everything(capsys, command):
    printed = {}
    for option in ("--help", "--help-all"):
        with pytest.raises(SystemExit, match="0"):
            main([command, option])
        printed[option] = capsys.readouterr().out
    assert "--ensemble" in printed["--help"]
    assert "--trainer.max_epochs" not in printed["--help"]
    assert "--help-all" in printed["--help"]
    assert {"--ensemble", "--trainer.max_epochs", "--model"} <= set(printed["--help-all"].split())


def test_the_formats_of_export_are_those_of_the_function():
    assert get_args(Format) == FORMATS


def test_names_cannot_control_the_terminal(tmp_path, capsys):
    ends = ["\x1b[2J", "\x9b2J", "\u202e", "\udcff"]
    with pytest.raises(SystemExit, match="1"):
        main(["report", "--attribution", str(tmp_path / "".join(ends))])
    groups = [f"group {end}" for end in ends[:3]]
    about = {"removals": [{"name": name, "examples": [n]} for n, name in enumerate(groups)]}
    attribution = Attribution(torch.randn(5, 1), torch.randn(5, 1, 3), tuple("abcde"), (0,), about)
    attribution.save(tmp_path / "answer")
    print_summary(Attribution.load(tmp_path / "answer"), verbose=True)
    logging.getLogger("lightning_dtda.test").warning("no %s", ends)
    written = capsys.readouterr()
    assert "group \\x1b[2J" in written.out
    assert "\\udcff" in written.err
    assert not any(end[0] in written.out + written.err for end in ends)
