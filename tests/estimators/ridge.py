"""Ridge regression: a training whose end is known."""

import lightning.pytorch as pl
import torch
from torch.utils.data import TensorDataset

DECAY = 0.3


class Ridge(pl.LightningModule):
    """Linear regression with weight decay: converges to the solution of ridge regression."""

    def __init__(self, rate=0.3):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1, bias=False, dtype=torch.float64)
        self.rate = rate

    def forward(self, inputs):
        return self.layer(inputs).squeeze(-1)

    def training_step(self, batch, batch_idx):
        return ((self(batch[0]) - batch[1]) ** 2).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.rate, weight_decay=DECAY)


def regression(examples=15, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(examples, 4, generator=generator, dtype=torch.float64)
    return TensorDataset(inputs, inputs[:, 0] + torch.randn(examples, generator=generator, dtype=torch.float64))


def solution(data, weights):
    """The minimum of the weighted mean of squared errors plus half the decay times the squared norm."""
    inputs, targets = data.tensors
    gram = 2 / len(inputs) * inputs.T * weights @ inputs + DECAY * torch.eye(4, dtype=torch.float64)
    return torch.linalg.solve(gram, 2 / len(inputs) * inputs.T @ (weights * targets))
