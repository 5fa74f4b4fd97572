"""Whoever maximizes minus the loss minimises it: the same training, and the same answers."""

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_dtda import Ensemble, InfluenceFunctions, TrajectoryRecorder, UnrolledDifferentiation, attribute
from lightning_dtda.errors import AttributionError
from lightning_dtda.estimators import (
    TRAK,
    Diagonal,
    ExactHessian,
    GaussNewton,
    GradientCosine,
    GradientDot,
    Hessian,
    TracIn,
)
from tests.estimators.ridge import Ridge, regression

ESTIMATORS = {
    "GradientDot": GradientDot(),
    "GradientCosine": GradientCosine(),
    "TracIn": TracIn(),
    "TRAK": TRAK(damping=0.1),
    "GaussNewton": InfluenceFunctions(GaussNewton(damping=0.1)),
    "ExactHessian": InfluenceFunctions(ExactHessian(damping=0.1)),
    "Hessian": InfluenceFunctions(Hessian(damping=0.1, tolerance=1e-12)),
    "Diagonal": InfluenceFunctions(Diagonal(damping=0.1)),
    "UnrolledDifferentiation": UnrolledDifferentiation(),
}


class Reward(Ridge):
    """Maximizes minus the loss of its parent, with the same weight decay."""

    def training_step(self, batch, batch_idx):
        return -super().training_step(batch, batch_idx)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.rate, weight_decay=0.3, maximize=True)


class Torn(Ridge):
    """Minimises by one half of its layers, and maximizes by the other."""

    def __init__(self):
        super().__init__()
        self.other = torch.nn.Linear(4, 1, bias=False, dtype=torch.float64)

    def forward(self, inputs):
        return super().forward(inputs) + self.other(inputs).squeeze(-1)

    def configure_optimizers(self):
        groups = [{"params": self.layer.parameters()}, {"params": self.other.parameters(), "maximize": True}]
        return torch.optim.SGD(groups, lr=0.01)


def answers(fit, root, make, estimator):
    pl.seed_everything(0, verbose=False)
    data = regression()
    fit(make(), DataLoader(data, 5, shuffle=True), TrajectoryRecorder(root), max_steps=6, max_epochs=-1)
    arguments = {"queries": regression(3, seed=1), "measurement": "prediction", "progress": False}
    return attribute(Ensemble.open(root), make(), data, estimator=estimator, **arguments).responses


@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS.keys())
def test_maximizing_minus_the_loss_is_minimising_it(fit, tmp_path, estimator):
    expected = answers(fit, tmp_path / "loss", Ridge, estimator)
    found = answers(fit, tmp_path / "reward", Reward, estimator)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_a_training_that_minimises_and_maximizes_has_no_objective(fit, tmp_path):
    with pytest.raises(AttributionError, match="no single objective"):
        answers(fit, tmp_path, Torn, GradientDot())
