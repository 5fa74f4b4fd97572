"""``lightning-dtda plan``: what things take, before they are started."""

import json

import lightning.pytorch as pl
import pytest
import torch
import yaml
from torch.utils.data import Subset

from lightning_dtda import Attribution, Ensemble, InfluenceFunctions, plan
from lightning_dtda.cli import main
from lightning_dtda.demo.diabetes import DiabetesData, DiabetesRegressor
from lightning_dtda.errors import RecordingError, ReplayError
from lightning_dtda.estimators import EKFAC, example_gradients
from lightning_dtda.estimators.curvatures import factors
from lightning_dtda.planning import planning, trials

pytest.importorskip("sklearn")

CONFIG = {
    "model": {"class_path": "lightning_dtda.demo.diabetes.DiabetesRegressor", "init_args": {"width": 4}},
    "data": {"class_path": "lightning_dtda.demo.diabetes.DiabetesData"},
    "trainer": {"max_epochs": 3, "accelerator": "cpu", "logger": False, "enable_checkpointing": False},
}
UNROLLED = "--estimators=[{class_path: UnrolledDifferentiation}]"
IDENTITY = "--estimators=[{class_path: InfluenceFunctions, init_args: {curvature: {class_path: Identity}}}]"
BOTH = UNROLLED[:-1] + ", " + IDENTITY.split("[")[1]
QUERIES = "--queries.indices=[0,1,2]"


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return path


@pytest.fixture
def runs(config, tmp_path):
    main(["record", "--config", str(config), "--ensemble", str(tmp_path / "runs"), "--seeds", "2"])
    return tmp_path / "runs"


@pytest.fixture
def planned(capsys):
    def _planned(*arguments):
        capsys.readouterr()
        main(["plan", *map(str, arguments), QUERIES, "--json"])
        return json.loads(capsys.readouterr().out)

    return _planned


@pytest.fixture
def broken_off(monkeypatch):
    """Let trainings be timed for no longer than the ten steps that are taken anyway."""
    monkeypatch.setattr(planning, "_SECONDS", 0.0)


def size_of(directory):
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def test_a_training_that_is_broken_off_tells_the_disk_of_all_of_it(broken_off, config, runs, planned, tmp_path):
    found = planned("--config", config, "--seeds", 2, UNROLLED)
    assert (found["runs"], found["steps"], found["recorded_steps"]) == (2, 36, 10)
    assert (found["examples"], found["queries"], found["removals"], found["parameters"]) == (353, 3, 353, 69)
    recorded = sum(size_of(run.path) for run in Ensemble.open(runs))
    # a run of 69 parameters is mostly random states, manifests and the headers of files, which are not counted
    tensors = sum(36 * 4 * run.layout.size for run in Ensemble.open(runs))
    assert tensors < found["recording"]["disk"] < recorded
    assert found["recording"]["seconds"] > 0
    # nothing is left of the trial where the command was called
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", "runs"}


def test_recorded_runs_are_planned_for_without_a_training(runs, planned, monkeypatch):
    monkeypatch.setattr(pl.Trainer, "fit", None)
    found = planned("--runs", runs, IDENTITY)
    assert (found["runs"], found["steps"], found["recorded_steps"]) == (2, 36, 36)
    # how long they took to train, their records do not say
    assert found["recording"]["seconds"] is None
    assert found["recording"]["disk"] == 2 * size_of(Ensemble.open(runs)[0].path)
    assert found["estimators"]["InfluenceFunctions(Identity)"]["disk"] == 2 * 3 * 353 * 4


def test_the_announced_disk_of_an_answer_is_that_of_its_numbers(runs, planned, tmp_path):
    announced = planned("--runs", runs, IDENTITY)["estimators"]["InfluenceFunctions(Identity)"]["disk"]
    main(["attribute", "--ensemble", str(runs), "--output", str(tmp_path / "answer"), QUERIES])
    assert Attribution.load(tmp_path / "answer").responses.numel() * 4 == announced


def test_longer_runs_more_of_them_and_more_queries_are_extrapolated(runs, planned):
    small = planned("--runs", runs, UNROLLED)
    large = planned("--runs", runs, UNROLLED, "--seeds", 8, "--epochs", 300, "--queries.count", 40)
    assert (large["runs"], large["steps"], large["queries"], large["given_queries"]) == (8, 3600, 40, 3)
    assert large["recording"]["disk"] == pytest.approx(small["recording"]["disk"] * 4 * 100)
    assert large["estimators"]["UnrolledDifferentiation"]["disk"] == 8 * 40 * 353 * 4
    assert (
        large["estimators"]["UnrolledDifferentiation"]["memory"]
        > small["estimators"]["UnrolledDifferentiation"]["memory"]
    )


def test_more_examples_for_as_many_epochs_are_more_steps(runs, planned):
    found = planned("--runs", runs, UNROLLED, "--examples", 706)
    assert (found["examples"], found["removals"], found["steps"]) == (706, 706, 72)
    assert planned("--runs", runs, UNROLLED, "--examples", 706, "--steps", 36)["steps"] == 36


@pytest.mark.slow
def test_workers_share_the_time_and_add_up_the_memory(runs, planned):
    alone, shared = (planned("--runs", runs, IDENTITY, "--workers", workers) for workers in (1, 5))
    assert (alone["workers"], shared["workers"]) == (1, 2)  # there are two runs to share out
    before, after = (found["estimators"]["InfluenceFunctions(Identity)"]["memory"] for found in (alone, shared))
    assert after == pytest.approx(2 * before, rel=0.2)


def test_the_table_says_what_is_extrapolated_and_what_to_choose(runs, capsys):
    main(["plan", "--runs", str(runs), QUERIES, "--seeds", "5", "--steps", "72", BOTH])
    said = " ".join(capsys.readouterr().out.split())
    assert "5 runs of 72 steps, 69 parameters, 353 examples, 3 queries, 353 removals" in said
    assert "extrapolated: 5 runs from 1, 72 steps from 36." in said
    assert "Choose UnrolledDifferentiation" in said
    assert "InfluenceFunctions(Identity)" in said


@pytest.mark.slow
def test_without_estimators_exact_unrolling_comes_first(runs, planned):
    found = planned("--runs", runs)
    assert list(found["estimators"]) == [
        "UnrolledDifferentiation",
        *(f"InfluenceFunctions({name})" for name in ("GaussNewton", "EKFAC", "Identity")),
        "TracIn",
    ]
    assert all(cost["seconds"] > 0 and cost["memory"] > 0 for cost in found["estimators"].values())


@pytest.mark.slow
def test_what_fits_neither_memory_nor_the_hours_is_not_chosen(runs, planned):
    too_small = BOTH.replace("UnrolledDifferentiation", "UnrolledDifferentiation, init_args: {memory_budget: 1.e-6}")
    found = planned("--runs", runs, too_small)
    assert "memory_budget is 1e-06 GiB. Raise it." in found["estimators"]["UnrolledDifferentiation"]
    assert found["advice"].startswith("Choose InfluenceFunctions(Identity)")
    assert "UnrolledDifferentiation is not possible: One query of one run needs about" in found["advice"]
    # with the budget raised, as the message says, it can
    assert planned("--runs", runs, BOTH)["advice"].startswith("Choose UnrolledDifferentiation")
    assert planned("--runs", runs, BOTH, "--hours", "1e-9")["advice"].startswith("Nothing fits: Unrolled")


@pytest.mark.slow
def test_a_cache_of_factors_is_left_alone(runs, tmp_path):
    data = DiabetesData()
    data.setup("fit")
    cached = InfluenceFunctions(EKFAC(cache=tmp_path / "cache"))
    found = plan(
        DiabetesRegressor(width=4),
        data,
        queries=Subset(data.validation, [0]),
        ensemble=Ensemble.open(runs),
        estimators=[cached, cached],
        examples=64,
        progress=False,
    )
    assert list(found.estimators) == ["InfluenceFunctions(EKFAC)", "InfluenceFunctions(EKFAC) 2"]
    assert not (tmp_path / "cache").exists()


def test_trials_take_as_many_combinations_of_outputs_as_all_examples(runs, monkeypatch):
    taken, fit = [], EKFAC.fit
    monkeypatch.setattr(EKFAC, "fit", lambda self, *given: taken.append(self.samples) or fit(self, *given))
    data, estimator = DiabetesData(), InfluenceFunctions(EKFAC())
    data.setup("fit")
    plan(
        DiabetesRegressor(width=4), data, queries=Subset(data.validation, [0]), ensemble=Ensemble.open(runs),
        estimators=[estimator], progress=False,
    )  # fmt: skip
    assert set(taken) == {3}  # 1,024 combinations over 353 examples, not over the few of a trial
    assert estimator.curvature.samples == "auto"


@pytest.mark.slow
def test_memory_grows_only_to_as_many_examples_as_are_held_at_once(runs, monkeypatch):
    data = DiabetesData()
    data.setup("fit")

    def memory(examples):
        found = plan(
            DiabetesRegressor(width=4), data, queries=Subset(data.validation, [0]), ensemble=Ensemble.open(runs),
            estimators=[InfluenceFunctions(EKFAC())], examples=examples, progress=False,
        )  # fmt: skip
        return found.estimators["InfluenceFunctions(EKFAC)"].memory

    monkeypatch.setattr(trials, "_LONG_ENOUGH", 0.0)  # the first trial, of 64 examples, is the only one
    unbounded = memory(1024) - memory(256)
    monkeypatch.setattr(factors, "_ENOUGH_BYTES", 1)
    monkeypatch.setattr(example_gradients, "_PAGES", 1)
    bounded = memory(1024) - memory(256)
    # what is left grows with all examples: an eighth of the memory is for columns of the root
    assert bounded < unbounded / 2


def test_other_data_than_those_of_the_runs_are_refused(runs):
    data = DiabetesData()
    data.setup("fit")
    with pytest.raises(ReplayError, match="was trained on 353"):
        plan(
            DiabetesRegressor(width=4),
            Subset(data.train, range(300)),
            queries=data.validation,
            ensemble=Ensemble.open(runs),
            progress=False,
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Give --config, the configuration to train, or --runs"),
        (["--steps", "5", "--epochs", "2"], "Leave one of them out"),
        (["--seeds", "0"], "runs=0 must be a positive integer"),
        (["--trainer.devices", "2"], "Set trainer.devices to 1"),
    ],
)
def test_errors_say_what_to_do(broken_off, config, capsys, arguments, message):
    given = ["--config", str(config), *arguments] if arguments else []
    with pytest.raises(SystemExit) as stop:
        main(["plan", *given])
    assert stop.value.code == 1
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_training_of_unknown_length_needs_one(broken_off):
    class Endless(DiabetesRegressor):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    def planned(**length):
        data = DiabetesData()
        data.setup("fit")
        trainer = pl.Trainer(max_epochs=-1, accelerator="cpu", logger=False, enable_progress_bar=False)
        asked = {"queries": Subset(data.validation, [0]), "estimators": [], "progress": False}
        return plan(Endless(), data, trainer=trainer, **asked, **length)

    with pytest.raises(RecordingError, match="Set max_steps, or max_epochs instead of max_time"):
        planned()
    found = planned(steps=200)
    assert (found.steps, found.recorded_steps) == (200, 10)
