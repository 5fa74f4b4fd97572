"""A training that ends with an average of its parameters is attributed as what it ends with."""

import pytest
import torch
from lightning.pytorch import callbacks
from torch import nn
from torch.utils.data import TensorDataset

from lightning_dtda import Ensemble, TrajectoryRecorder, UnrolledDifferentiation, attribute
from lightning_dtda.errors import RecordingError
from tests.finite_differences import losses
from tests.regression import WeightedRegressor, weighted_data
from tests.trainings import of, sgd, train

STEP, TOLERANCE = 1e-4, 1e-6
QUERIES = weighted_data(4, seed=1)

if not hasattr(callbacks, "EMAWeightAveraging"):
    pytest.skip("lightning averages by StochasticWeightAveraging only", allow_module_level=True)


def with_batch_norm():
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5, momentum=0.3), nn.Tanh(), nn.Linear(5, 1))


AVERAGES = {
    "stochastic weight averaging": (
        lambda: callbacks.StochasticWeightAveraging(swa_lrs=0.02, swa_epoch_start=1),
        None,
        of(torch.optim.AdamW),
    ),
    "exponential": (lambda: callbacks.EMAWeightAveraging(decay=0.7), None, of(torch.optim.AdamW)),
    "exponential, from a step on, every other step": (
        lambda: callbacks.EMAWeightAveraging(decay=0.7, update_every_n_steps=2, update_starting_at_step=3),
        None,
        sgd(momentum=0.9),
    ),
    "of all steps": (lambda: callbacks.WeightAveraging(), None, sgd(momentum=0.9)),
    "of buffers too": (
        lambda: callbacks.EMAWeightAveraging(decay=0.7, use_buffers=True),
        with_batch_norm,
        sgd(momentum=0.9),
    ),
    "of parameters only": (
        lambda: callbacks.EMAWeightAveraging(decay=0.7, use_buffers=False),
        with_batch_norm,
        sgd(momentum=0.9),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["reverse", "forward"])
@pytest.mark.parametrize(("average", "network", "optimizer"), AVERAGES.values(), ids=AVERAGES)
def test_responses_are_the_derivatives_of_the_average(fit, tmp_path, average, network, optimizer, mode):
    inputs, targets, weights = weighted_data()

    def trained(weights, *more):
        return train(fit, optimizer, inputs, targets, weights, average(), *more, network=network, max_epochs=3)

    module = trained(weights, TrajectoryRecorder(tmp_path))
    answer = attribute(
        Ensemble.open(tmp_path),
        WeightedRegressor(optimizer, network=network),
        TensorDataset(inputs, targets, weights),
        queries=TensorDataset(*QUERIES),
        estimator=UnrolledDifferentiation(mode=mode, horizon=None),
        progress=False,
    )
    torch.testing.assert_close(answer.baseline[0], losses(module, *QUERIES[:2]), rtol=1e-10, atol=1e-12)
    direction = torch.randn(len(weights), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    direction /= direction.norm()
    moved = [losses(trained(weights + sign * STEP * direction), *QUERIES[:2]) for sign in (1, -1)]
    expected = -(moved[0] - moved[1]) / (2 * STEP)
    error = (answer.responses[0] @ direction - expected).abs().max() / expected.abs().max()
    assert error < TOLERANCE, f"relative error {error:.2e}"


def test_the_training_is_unchanged_to_the_bit(fit, tmp_path):
    def trained(*more):
        average = callbacks.EMAWeightAveraging(decay=0.7)
        return train(fit, sgd(), *weighted_data(), average, *more, max_epochs=2), average

    (alone, _), (followed, average) = trained(), trained(TrajectoryRecorder(tmp_path))
    for name, parameter in alone.named_parameters():
        assert torch.equal(parameter, followed.get_parameter(name))
    assert "on_train_end" not in vars(average)  # the callback is given back as it was


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_an_earlier_step_is_that_of_the_training(fit, tmp_path, mode):
    data = TensorDataset(*weighted_data())
    train(
        fit,
        sgd(),
        *data.tensors,
        callbacks.EMAWeightAveraging(decay=0.7),
        TrajectoryRecorder(tmp_path / "averaged"),
        max_epochs=2,
    )
    plain = train(fit, sgd(), *data.tensors, TrajectoryRecorder(tmp_path / "plain"), max_epochs=2, max_steps=4)

    def answer(root, **arguments):
        return attribute(
            Ensemble.open(root),
            WeightedRegressor(sgd()),
            data,
            queries=TensorDataset(*QUERIES),
            estimator=UnrolledDifferentiation(mode=mode, horizon=None),
            progress=False,
            **arguments,
        )

    earlier = answer(tmp_path / "averaged", step=4)
    torch.testing.assert_close(earlier.baseline[0], losses(plain, *QUERIES[:2]), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(earlier.responses, answer(tmp_path / "plain").responses, rtol=1e-9, atol=1e-12)


def test_statistics_that_are_taken_anew_are_refused(fit, tmp_path):
    average = callbacks.StochasticWeightAveraging(swa_lrs=0.02, swa_epoch_start=1)
    with pytest.raises(RecordingError, match=r"recomputes the statistics of BatchNorm.*EMAWeightAveraging"):
        train(fit, sgd(), *weighted_data(), average, TrajectoryRecorder(tmp_path), network=with_batch_norm)


def test_several_averages_are_refused(fit, tmp_path):
    averages = callbacks.EMAWeightAveraging(), callbacks.WeightAveraging()
    with pytest.raises(RecordingError, match="several callbacks that average"):
        train(fit, sgd(), *weighted_data(), *averages, TrajectoryRecorder(tmp_path))


def test_an_average_that_is_not_linear_is_refused(fit, tmp_path):
    average = callbacks.WeightAveraging(avg_fn=lambda old, new, count: (old * old + new * new).sqrt())
    with pytest.raises(RecordingError, match="not linear"):
        train(fit, sgd(), *weighted_data(), average, TrajectoryRecorder(tmp_path), max_epochs=1)
