"""Dropout put in from recorded states against the training's own draws; what cannot be put in is refused."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from lightning_dtda import Ensemble, TrajectoryRecorder, UnrolledDifferentiation, attribute
from lightning_dtda.errors import RecordingError, ReplayError
from lightning_dtda.replay.dropout import Dropout
from lightning_dtda.replay.random_states import random_states
from tests.recording.modules import Regressor, shuffled
from tests.regression import WeightedRegressor, loader, weighted_data

CPU = torch.device("cpu")


def traced(module, *shape):
    inputs = torch.randn(*shape)
    return Dropout.trace(lambda: module(inputs), lambda: module(inputs[:1]), shape[0], torch.float32, CPU), inputs


LAYERS = {
    "dropout": (nn.Dropout(0.3), (5, 4)),
    "two in a row": (nn.Sequential(nn.Dropout(0.3), nn.Tanh(), nn.Dropout(0.6)), (5, 4)),
    "everything dropped": (nn.Dropout(1.0), (5, 4)),
    "nothing dropped": (nn.Dropout(0.0), (5, 4)),
    "channels": (nn.Dropout2d(0.5), (5, 3, 2, 2)),
    "volumes": (nn.Dropout3d(0.5), (5, 3, 2, 2, 2)),
    "alpha": (nn.AlphaDropout(0.4), (5, 4)),
    "feature alpha": (nn.FeatureAlphaDropout(0.4), (5, 3, 2, 2)),
    "in place": (nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.3, inplace=True)), (5, 4)),
}


@pytest.mark.parametrize(("module", "shape"), LAYERS.values(), ids=LAYERS)
def test_masks_drawn_again_do_what_the_layer_did(module, shape):
    dropout, inputs = traced(module, *shape)
    states = random_states(CPU)
    expected = module(inputs)
    after = torch.get_rng_state()

    masks = dropout.draw(states, shape[0], torch.float32)
    with dropout.for_batch(masks):
        torch.testing.assert_close(module(inputs), expected)
    for number, example in enumerate(inputs):
        with dropout.for_example([tuple(part[number] for part in mask) for mask in masks]):
            torch.testing.assert_close(module(example[None]), expected[number][None])
    assert torch.equal(torch.get_rng_state(), after)  # nothing is drawn that the caller would miss


def test_masks_follow_the_order_in_memory():
    module = nn.Dropout(0.5)
    inputs = torch.randn(4, 2, 3, 3).to(memory_format=torch.channels_last)
    dropout = Dropout.trace(lambda: module(inputs), lambda: module(inputs[:1]), 4, torch.float32, CPU)
    states = random_states(CPU)
    expected = module(inputs)
    with dropout.for_batch(dropout.draw(states, 4, torch.float32)):
        assert torch.equal(module(inputs), expected)


def test_functions_are_what_they_were_after_an_error():
    before = functional.dropout
    dropout, inputs = traced(nn.Dropout(0.5), 3, 2)
    masks = dropout.draw(random_states(CPU), 3, torch.float32)
    with pytest.raises(ReplayError, match="calls dropout for a tensor of shape"), dropout.for_batch(masks):
        functional.dropout(functional.dropout(inputs))
    assert functional.dropout is before


def test_masks_that_are_left_over_are_an_error():
    dropout, _ = traced(nn.Dropout(0.5), 3, 2)
    masks = dropout.draw(random_states(CPU), 3, torch.float32)
    with pytest.raises(ReplayError, match="1 times less"), dropout.for_batch(masks):
        pass


class NoisyInputs(nn.Module):
    def forward(self, inputs):
        return functional.dropout(inputs + torch.rand(()), 0.5)


class Mixing(nn.Module):
    """Drops from all pairs of examples."""

    def forward(self, inputs):
        return functional.dropout(inputs @ inputs.T, 0.5)


@pytest.mark.parametrize(
    ("module", "message"), [(NoisyInputs(), "other than those of"), (Mixing(), "which part belongs to which example")]
)
def test_what_cannot_be_given_to_single_examples_is_refused(module, message):
    with pytest.raises(ReplayError, match=message):
        traced(module, 4, 3)


class ForgetfulLosses(Regressor):
    def example_losses(self, batch):
        hidden = torch.tanh(self.net[0](batch["inputs"]))
        return (self.net[3](hidden).squeeze(-1) - batch["targets"]) ** 2


def test_losses_of_single_examples_that_draw_nothing_are_refused_at_recording(fit, tmp_path):
    with pytest.raises(RecordingError, match="calls dropout 1 times for a batch and 0 times"):
        fit(ForgetfulLosses(dropout=0.5), shuffled(), TrajectoryRecorder(tmp_path, "run"), max_epochs=1)


def network():
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Dropout(0.4), nn.Linear(5, 1))


def test_masks_of_a_single_precision_training_are_drawn_in_it_for_a_double_precision_replay(fit, tmp_path):
    def make():
        return WeightedRegressor(lambda m: torch.optim.SGD(m.parameters(), 0.1), dtype=torch.float32, network=network)

    torch.manual_seed(0)
    data = TensorDataset(*weighted_data(dtype=torch.float32))
    fit(make(), loader(*data.tensors), TrajectoryRecorder(tmp_path, "run"), max_epochs=3)
    answers = [
        attribute(
            Ensemble.open(tmp_path),
            make(),
            data,
            queries=data,
            estimator=UnrolledDifferentiation(precision=precision),
            progress=False,
        ).responses.double()
        for precision in ("recorded", "float64")
    ]
    torch.testing.assert_close(*answers, rtol=1e-3, atol=1e-5)
