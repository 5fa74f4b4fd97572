"""The post-hoc step: what is asked, what is kept after a crash, what is refused."""

import re

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, Subset

from lightning_dtda import (
    Attribution,
    Ensemble,
    InfluenceFunctions,
    TrajectoryRecorder,
    UnrolledDifferentiation,
    attribute,
)
from lightning_dtda.errors import AttributionError, ExecutionError, TrajectoryError
from lightning_dtda.estimators import Identity
from lightning_dtda.trajectory.storage import read_json, write_json
from tests.attribution.regressors import DATA, QUERIES, ask, module, recorded
from tests.regression import WeightedRegressor, loader


@pytest.fixture
def ensemble(fit, tmp_path):
    return recorded(fit, tmp_path / "runs", seeds=3)


def test_baseline_is_what_the_trained_models_measure(ensemble):
    for measurement in ("loss", "prediction"):
        attribution = ask(ensemble, measurement=measurement)
        for run, measured in zip(ensemble, attribution.baseline, strict=True):
            trained = module()
            trained.load_state_dict(run.theta(run.steps))
            predictions = trained(QUERIES.tensors[0])
            expected = (predictions - QUERIES.tensors[1]) ** 2 if measurement == "loss" else predictions
            torch.testing.assert_close(measured, expected.detach())


@pytest.mark.parametrize(
    ("estimator", "announced"),
    [
        (InfluenceFunctions(Identity(), memory_budget=0.5), r"up to 512\.0 MiB of memory"),
        # objects and traces are 12 MiB, and tensors far below one
        (UnrolledDifferentiation(compile=False), r"about 12\.\d MiB of memory"),
    ],
    ids=["a budget", "a step that was measured"],
)
def test_the_log_says_how_much_memory_is_needed(ensemble, caplog, estimator, announced):
    with caplog.at_level("INFO", "lightning_dtda.attribution.resources"):
        ask(ensemble, estimator=estimator)
    assert re.search(announced, caplog.text)


def root_mean_square(module, batch):
    return (module(batch[0]) - batch[1]).abs()


def test_a_callable_measures(ensemble):
    by_callable = ask(ensemble, measurement=root_mean_square)
    assert by_callable.measurement == f"{__name__}.root_mean_square"
    torch.testing.assert_close(by_callable.baseline, ask(ensemble).baseline.sqrt())
    by_path = ask(ensemble, measurement=f"{__name__}.root_mean_square")
    assert torch.equal(by_path.responses, by_callable.responses)


def test_data_may_be_a_dataset_a_loader_a_module_or_a_data_module(ensemble):
    class Data(pl.LightningDataModule):
        def train_dataloader(self):
            return loader(*DATA.tensors)

    expected = ask(ensemble).responses
    assert torch.equal(ask(ensemble, data=loader(*DATA.tensors)).responses, expected)
    assert torch.equal(ask(ensemble, data=Data()).responses, expected)


def test_queries_are_called_by_their_place_in_the_data_set(ensemble):
    part = ask(ensemble, queries=Subset(QUERIES, [4, 2]))
    assert part.queries == (4, 2)
    torch.testing.assert_close(part.responses, ask(ensemble).responses[:, [4, 2]])
    assert ask(ensemble, queries=DataLoader(QUERIES, batch_size=2)).queries == (0, 1, 2, 3, 4)


def test_a_crash_loses_only_the_batch_of_runs_under_way(ensemble, tmp_path, monkeypatch):
    expected = ask(ensemble).responses
    original, swept = UnrolledDifferentiation.estimate, []

    def estimate(self, runs, *arguments):
        if len(swept) == 2:
            raise KeyboardInterrupt
        swept.append([run.name for run in runs])
        return original(self, runs, *arguments)

    arguments = {"estimator": UnrolledDifferentiation(runs_per_batch=1), "output": tmp_path / "answer"}
    monkeypatch.setattr(UnrolledDifferentiation, "estimate", estimate)
    with pytest.raises(KeyboardInterrupt):
        ask(ensemble, **arguments)
    with pytest.warns(UserWarning, match=r"1 runs are missing \(seed-0002\)"):
        assert Attribution.load(tmp_path / "answer").runs == ("seed-0000", "seed-0001")

    swept.clear()
    resumed = ask(ensemble, **arguments)
    assert swept == [["seed-0002"]]
    torch.testing.assert_close(resumed.responses, expected, rtol=1e-4, atol=1e-6)


def test_the_answer_to_another_question_is_not_mixed_in(ensemble, tmp_path):
    ask(ensemble, output=tmp_path / "answer")
    with pytest.raises(AttributionError, match="different measurement"):
        ask(ensemble, output=tmp_path / "answer", measurement="prediction")
    with pytest.raises(AttributionError, match="queries"):
        ask(ensemble, output=tmp_path / "answer", queries=Subset(QUERIES, [0]))
    replaced = ask(ensemble, output=tmp_path / "answer", measurement="prediction", overwrite=True)
    assert Attribution.load(tmp_path / "answer").measurement == replaced.measurement == "prediction"


def test_a_group_and_a_step_are_part_of_the_question(ensemble, tmp_path):
    groups = {"first": [0, 1, 2], "second": [5, 6]}
    asked = ask(ensemble, output=tmp_path / "answer", removals=groups, step=5)
    loaded = Attribution.load(tmp_path / "answer")
    assert loaded.removals == asked.removals == ("first", "second")
    assert loaded.members == ((0, 1, 2), (5, 6))
    assert loaded.step == 5
    assert torch.equal(loaded.responses, ask(ensemble, removals=groups, step=5).responses)
    # the same groups in another order are other columns
    turned = dict(reversed(groups.items()))
    for another in ({"removals": groups}, {"step": 5}, {"removals": turned, "step": 5}):
        with pytest.raises(AttributionError, match=r"another question \(different (removals|step)\W"):
            ask(ensemble, output=tmp_path / "answer", **another)
    assert ask(ensemble, output=tmp_path / "answer", removals=groups, step=5).removals == ("first", "second")


def test_more_runs_are_added_and_other_runs_are_refused(ensemble, fit, tmp_path):
    ask(ensemble[:2], output=tmp_path / "answer")
    assert ask(ensemble, output=tmp_path / "answer").runs == ("seed-0000", "seed-0001", "seed-0002")
    with pytest.raises(AttributionError, match="different runs"):
        ask(ensemble[:2], output=tmp_path / "answer")
    # the same name, trained from another seed
    pl.seed_everything(77, verbose=False)
    recorder = TrajectoryRecorder(tmp_path / "runs", run="seed-0001", overwrite=True)
    fit(module(), loader(*DATA.tensors), recorder, max_epochs=3)
    with pytest.raises(AttributionError, match="different runs"):
        ask(Ensemble.open(tmp_path / "runs"), output=tmp_path / "answer")


def test_an_unknown_format_is_refused_until_it_is_attributed_again(ensemble, tmp_path):
    output = tmp_path / "answer"
    first = ask(ensemble, output=output)
    expected = first.responses[:]
    index = output / "attribution.json"
    write_json(index, read_json(index) | {"format_version": 2})  # had the opposite sign
    with pytest.raises(TrajectoryError, match=r"format version 2; .* Attribute again"):
        Attribution.load(output)
    with pytest.raises(AttributionError, match=r"different format_version.*overwrite=True"):
        ask(ensemble, output=output)
    ask(ensemble, output=output, overwrite=True)
    assert torch.equal(Attribution.load(output).responses[:], expected)


def test_a_measurement_without_a_name_is_not_stored(ensemble, tmp_path):
    with pytest.raises(AttributionError, match="has no unique name"):
        ask(ensemble, output=tmp_path / "answer", measurement=lambda module, batch: module(batch[0]))


def test_a_directory_of_something_else_is_not_written_to(ensemble, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("")
    with pytest.raises(AttributionError, match="holds no attribution"):
        ask(ensemble, output=tmp_path / "full")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"measurement": "accuracy"}, "loss, margin, prediction"),
        ({"measurement": "margin"}, "class scores"),
        ({"measurement": lambda module, batch: module(batch[0]).mean()}, "must return"),
        ({"measurement": lambda module, batch: module(batch[0]) * torch.nan}, "not finite"),
        ({"data": [1, 2, 3]}, "Give a Dataset"),
        ({"queries": Subset(QUERIES, [])}, "no queries"),
        ({"removals": [[0, 12]]}, "index 12; valid indices are 0 to 11"),
        ({"step": 10}, r"Not all runs have a step 10: .*seed-0000 has 9 steps. Give a step from 1 to 9"),
        ({"step": 0}, "Not all runs have a step 0"),
        ({"step": 2.5}, "step=2.5 is not an integer"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_question_without_an_answer_is_refused(ensemble, arguments, message):
    with pytest.raises(AttributionError, match=message):
        ask(ensemble, **arguments)


def raising(module, batch):
    raise ValueError("a query of another kind")


NONSENSE = {
    "a path for the ensemble": (lambda ask, ensemble: ask("runs"), "'runs' is not an instance of Ensemble"),
    "a class for the module": (
        lambda ask, ensemble: attribute(ensemble, WeightedRegressor, DATA, queries=QUERIES),
        "is not an instance of LightningModule",
    ),
    "a class for the estimator": (
        lambda ask, ensemble: ask(ensemble, estimator=UnrolledDifferentiation),
        "is not an instance of Estimator",
    ),
    "a measurement that fails": (
        lambda ask, ensemble: ask(ensemble, measurement=raising),
        "measurement fails .*a query of another kind.*a batch of one query",
    ),
    "a file for the output": (lambda ask, ensemble: ask(ensemble, output=__file__), "cannot be written"),
}


@pytest.mark.parametrize(("call", "message"), NONSENSE.values(), ids=NONSENSE)
def test_nonsense_is_refused_in_words(ensemble, call, message):
    with pytest.raises(AttributionError, match=message):
        call(ask, ensemble)


def test_an_unknown_device_is_refused_in_words(ensemble):
    with pytest.raises(ExecutionError, match=r"no device 'gpu'.*such as cpu, cuda"):
        ask(ensemble, device="gpu")


def test_an_attribution_that_failed_does_not_stand_in_the_way(ensemble, tmp_path):
    with pytest.raises(AttributionError, match="measurement fails"):
        ask(ensemble, output=tmp_path / "answer", measurement=raising)
    assert ask(ensemble, output=tmp_path / "answer").measurement == "loss"
