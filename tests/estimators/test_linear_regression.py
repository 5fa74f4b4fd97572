"""A closed case: full-batch gradient descent on linear regression, whose response to a weight is known."""

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_dtda import Ensemble, TrajectoryRecorder, UnrolledDifferentiation, attribute

RATE, STEPS = 0.1, 40


class LinearRegression(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1, bias=False, dtype=torch.float64)

    def forward(self, inputs):
        return self.layer(inputs).squeeze(-1)

    def training_step(self, batch, batch_idx):
        return ((self(batch[0]) - batch[1]) ** 2).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=RATE)


def closed_form(theta_0, inputs, targets, query):
    r"""Differentiate the explicit solution with respect to each weight.

    With :math:`A_w = \frac2N X^T W X` and :math:`b_w = \frac2N X^T W y` gradient descent is the affine recursion
    :math:`\theta_{t+1} = (I - \eta A_w) \theta_t + \eta b_w`, so that for :math:`M = I - \eta A`

    .. math:: \theta_T = M^T \theta_0 + \eta \sum_{j<T} M^j b, \qquad
        \frac{d\theta_T}{dw_n} = \sum_{j<T} M^{T-1-j} \eta \frac2N x_n (y_n - x_n^T \theta_j).
    """
    examples, features = inputs.shape
    identity = torch.eye(features, dtype=torch.float64)
    step = identity - RATE * 2 / examples * inputs.T @ inputs
    pull = RATE * 2 / examples * inputs.T @ targets
    # theta_j by the spectral decomposition, not by iterating
    values, vectors = torch.linalg.eigh(step)
    fixed = torch.linalg.solve(identity - step, pull)
    derivative = torch.zeros(features, examples, dtype=torch.float64)
    for j in range(STEPS):
        theta_j = fixed + vectors @ (values**j * (vectors.T @ (theta_0 - fixed)))
        propagate = vectors @ torch.diag(values ** (STEPS - 1 - j)) @ vectors.T
        residuals = targets - inputs @ theta_j
        derivative += propagate @ (RATE * 2 / examples * inputs.T * residuals)
    return -query @ derivative


def test_responses_are_those_of_the_closed_form(fit, tmp_path):
    generator = torch.Generator().manual_seed(0)
    inputs, targets = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((15, 4), (15,)))
    queries = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    pl.seed_everything(0, verbose=False)
    module = LinearRegression()
    theta_0 = module.layer.weight.detach()[0].clone()
    data = TensorDataset(inputs, targets)
    fit(
        module,
        DataLoader(data, batch_size=15, shuffle=True),
        TrajectoryRecorder(tmp_path),
        max_steps=STEPS,
        max_epochs=-1,
    )
    attribution = attribute(
        Ensemble.open(tmp_path),
        LinearRegression(),
        data,
        queries=TensorDataset(queries, torch.zeros(3, dtype=torch.float64)),
        measurement="prediction",
        estimator=UnrolledDifferentiation(horizon=None),
        progress=False,
    )
    torch.testing.assert_close(
        attribution.responses[0], closed_form(theta_0, inputs, targets, queries), rtol=1e-10, atol=1e-12
    )
