"""Measurements against their definitions."""

import lightning.pytorch as pl
import pytest
import torch

from lightning_dtda.errors import AttributionError
from lightning_dtda.replay import resolve_measurement

SCORES = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABELS = torch.tensor([0, 3, 1, 1, 2, 0])


class Identity(pl.LightningModule):
    def forward(self, inputs):
        return inputs


def test_margin_is_the_log_odds_of_the_correct_class():
    _, margin = resolve_measurement("margin")
    p = SCORES.softmax(1)[range(6), LABELS]
    torch.testing.assert_close(margin(Identity(), [SCORES, LABELS]), (p / (1 - p)).log())


def test_margin_of_a_certain_model_has_a_finite_gradient():
    _, margin = resolve_measurement("margin")
    scores = torch.tensor([[60.0, -60.0]], requires_grad=True)
    value = margin(Identity(), [scores, torch.tensor([0])]).sum()
    (gradient,) = torch.autograd.grad(value, scores)
    assert value.item() == pytest.approx(120)
    torch.testing.assert_close(gradient, torch.tensor([[1.0, -1.0]]))


def test_prediction_is_the_scalar_output():
    _, prediction = resolve_measurement("prediction")
    torch.testing.assert_close(prediction(Identity(), [SCORES[:, :1], LABELS]), SCORES[:, 0])
    with pytest.raises(AttributionError, match="margin"):
        prediction(Identity(), [SCORES, LABELS])


def test_an_own_predict_step_is_used():
    class Named(Identity):
        def predict_step(self, batch, batch_idx):
            return self(batch["inputs"])

    _, prediction = resolve_measurement("prediction")
    torch.testing.assert_close(prediction(Named(), {"inputs": SCORES[:, :1]}), SCORES[:, 0])
