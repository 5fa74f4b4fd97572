"""A model with one parameter, whose loss has two minima, trained by noisy gradient descent.

Nothing here is specific to attribution.
"""

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

EXAMPLES = 20
SHIFT, TILT = 7, 13
"""The example that shifts both wells, and the one that raises one of them above the other."""


def data():
    """Return how much each example shifts and tilts the wells ``(N, 2)``."""
    values = torch.zeros(EXAMPLES, 2)
    values[SHIFT, 0], values[TILT, 1] = 0.4, 0.01
    return values


def potential(theta, shift, tilt):
    r"""Return an example's loss :math:`(\theta^2 - 1)^2 / 4 + s\,\theta (\theta^2 - 1) + t\,\theta`."""
    return (theta**2 - 1) ** 2 / 4 + shift * theta * (theta**2 - 1) + tilt * theta


class Wells(pl.LightningDataModule):
    """All examples in each batch."""

    def setup(self, stage):
        """Make the data set."""
        self.train = TensorDataset(data())

    def train_dataloader(self):
        """Return one batch with everything."""
        return DataLoader(self.train, EXAMPLES)

    def val_dataloader(self):
        """Return a single query; what is measured, the parameter, does not depend on it."""
        return DataLoader(TensorDataset(torch.zeros(1, 2)))


class DoubleWell(pl.LightningModule):
    r"""Langevin dynamics: gradient descent with noise, which samples a Boltzmann distribution.

    .. math:: \theta \leftarrow \theta - \eta \nabla L(\theta) + \sqrt{2 \eta / \beta}\, \xi, \qquad \xi \sim N(0, 1)

    Args:
        inverse_temperature: :math:`\beta`.
        learning_rate: :math:`\eta`.
    """

    def __init__(self, inverse_temperature: float = 2000.0, learning_rate: float = 0.01) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.theta = torch.nn.Parameter(torch.randn(1))

    def forward(self, inputs):
        """Return the parameter for each input."""
        return self.theta.expand(len(inputs))

    def training_step(self, batch, batch_idx):
        """Return the mean loss, and a random force as a term that is linear in the parameter."""
        shift, tilt = batch[0].unbind(1)
        loss = potential(self(batch[0]), shift, tilt).mean()
        scale = (2 / (self.hparams.learning_rate * self.hparams.inverse_temperature)) ** 0.5
        return loss - (scale * torch.randn_like(self.theta) * self.theta).sum()

    def configure_optimizers(self):
        """Return plain gradient descent."""
        return torch.optim.SGD(self.parameters(), lr=self.hparams.learning_rate)
