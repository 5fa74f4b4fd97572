"""What is said of each run's responses: right if it distinguishes a good record from a bad one."""

import logging

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from lightning_dtda import Ensemble, TrajectoryRecorder, UnrolledDifferentiation, attribute
from lightning_dtda.errors import ReplayError
from lightning_dtda.estimators.diagnosis import diagnose
from lightning_dtda.estimators.estimator import Diagnosis
from lightning_dtda.evaluation.checking import check
from lightning_dtda.optimizers.adam import Adam
from lightning_dtda.replay import Replay, training_examples
from tests.regression import WeightedRegressor, loader, weighted_data


def adam(module):
    return torch.optim.Adam(module.parameters(), lr=0.02)


def record(fit, root, network=None, dtype=torch.float32, gradients="none"):
    """Record runs of a small regression, and return what is needed to attribute them."""
    inputs, targets, weights = weighted_data(dtype=dtype)

    def made():
        return WeightedRegressor(adam, network=network, dtype=dtype)

    for seed in range(2):
        pl.seed_everything(seed, verbose=False)
        recorder = TrajectoryRecorder(root, gradients=gradients)
        fit(made(), loader(inputs, targets, weights), recorder, max_epochs=5)
    data = TensorDataset(inputs, targets, weights)
    return Ensemble.open(root), made(), data


def diagnoses(ensemble, module, data, **arguments):
    answer = attribute(
        ensemble, module, data, queries=data, estimator=UnrolledDifferentiation(**arguments), progress=False
    )
    return answer, list(answer.about["diagnosis"].values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_responses_of_a_sound_training_are_sound(fit, tmp_path, dtype):
    answer, found = diagnoses(*record(fit, tmp_path, dtype=dtype))

    for diagnosis in found:
        assert diagnosis["finite_differences"] < 1e-6
        assert diagnosis["precision"] == 0 if dtype == torch.float64 else 0 < diagnosis["precision"] < 1e-4
    assert answer.ill_conditioned == ()
    for number, run in enumerate(answer.runs):
        assert answer.about["largest_response"][run] == pytest.approx(float(answer.responses[number].abs().max()))


def test_a_device_without_double_precision_has_no_diagnosis(fit, tmp_path):
    ensemble, module, data = record(fit, tmp_path)
    runs, examples = list(ensemble), training_examples(data)

    def make(runs, precision):
        return Replay(runs, module, examples, precision=precision, device="mps")

    assert diagnose(runs, make, lambda replay, step: (replay.point(step).theta, {})) == [Diagnosis(None, None)] * 2
    with pytest.raises(ReplayError, match=r'"mps" does not support double precision\. Give device="cpu"'):
        make(runs, "float64")


def with_batch_norm():
    return nn.Sequential(nn.Linear(3, 5, bias=False), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.2), nn.Linear(5, 1))


def test_batch_norm_and_dropout_are_followed(fit, tmp_path):
    _, found = diagnoses(*record(fit, tmp_path, with_batch_norm, torch.float64))

    assert max(diagnosis["finite_differences"] for diagnosis in found) < 1e-6


def test_a_wrong_adjoint_shows(fit, tmp_path, monkeypatch):
    recorded = record(fit, tmp_path, dtype=torch.float64)
    right = Adam.adjoint

    def wrong(self, *arguments, **keywords):
        theta, state, gradient = right(self, *arguments, **keywords)
        return theta, {key: 0.5 * part for key, part in state.items()}, gradient

    monkeypatch.setattr(Adam, "adjoint", wrong)
    _, found = diagnoses(*recorded)

    assert min(diagnosis["finite_differences"] for diagnosis in found) > 1e-2


class Cancelling(nn.Module):
    """Subtracts what it added: in single precision little is left of its argument."""

    def forward(self, values):
        return (values + 1e6) - 1e6


def cancelling():
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), Cancelling(), nn.Linear(5, 1))


def test_responses_that_are_partly_rounding_are_reported(fit, tmp_path, caplog):
    recorded = record(fit, tmp_path, network=cancelling)
    # a replay in double precision is far from the record, too
    with caplog.at_level(logging.WARNING, "lightning_dtda"):
        answer, found = diagnoses(*recorded)

    assert all(diagnosis["precision"] is None or diagnosis["precision"] > 0.05 for diagnosis in found)
    assert answer.ill_conditioned == ("seed-0000", "seed-0001")
    assert "2 of 2 runs are ill-conditioned" in caplog.text
    assert 'precision="float64"' in caplog.text


def normalised_behind_a_bias():
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 1))


@pytest.mark.parametrize("gradients", ["float32", "none"])
def test_a_run_that_rounding_moves_is_ill_conditioned(fit, tmp_path, gradients):
    # the bias in front of BatchNorm has no gradient but rounding, which Adam turns into steps
    recorded = record(fit, tmp_path, normalised_behind_a_bias, gradients=gradients)

    answer, found = diagnoses(*recorded)

    assert min(diagnosis["precision"] for diagnosis in found) > 0.05
    assert answer.ill_conditioned == answer.runs


def test_double_precision_is_no_matter_of_it(fit, tmp_path):
    answer, _ = diagnoses(*record(fit, tmp_path), precision="float64")

    assert answer.ill_conditioned == ()


class InSingle(WeightedRegressor):
    """Has a number of its own that knows one precision only."""

    def training_step(self, batch, batch_idx):
        inputs, targets, weights = batch
        scale = torch.eye(3, dtype=torch.float32)
        return (weights * (self(inputs @ scale) - targets) ** 2).mean()


def test_a_module_that_computes_in_one_precision_only_is_attributed_without_a_diagnosis(fit, tmp_path, caplog):
    pl.seed_everything(0, verbose=False)
    data = TensorDataset(*weighted_data(dtype=torch.float32))
    fit(InSingle(adam, dtype=torch.float32), loader(*data.tensors), TrajectoryRecorder(tmp_path), max_epochs=2)

    with caplog.at_level(logging.WARNING, "lightning_dtda"):
        answer, found = diagnoses(Ensemble.open(tmp_path), InSingle(adam, dtype=torch.float32), data)

    assert found == [{}]
    assert answer.responses.abs().sum() > 0
    assert answer.ill_conditioned == ()
    assert "double precision: the module fails in float64 (RuntimeError" in caplog.text
    finding = check(Ensemble.open(tmp_path), InSingle(adam, dtype=torch.float32), data, queries=data).results[1]
    assert (finding.name, finding.passed) == ("replay in double precision", False)
    assert "The module fails in double precision" in finding.advice
