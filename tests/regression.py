"""A small weighted regression: the loss that attribution differentiates, written out for a Trainer to minimise."""

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset


def weighted_data(examples=12, features=3, seed=0, dtype=torch.float64):
    """Inputs, targets and example weights of one."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(examples, features, generator=generator, dtype=dtype)
    targets = torch.sin(inputs[:, 0]) + inputs[:, 1] * inputs[:, 2]
    return inputs, targets, torch.ones(examples, dtype=dtype)


class Augmented(TensorDataset):
    """Adds noise to the inputs, other noise each time."""

    def __getitem__(self, index):
        inputs, *rest = super().__getitem__(index)
        return inputs + 0.3 * torch.randn_like(inputs), *rest


def loader(inputs, targets, weights, batch_size=4, dataset=TensorDataset, workers=0):
    return DataLoader(dataset(inputs, targets, weights), batch_size=batch_size, shuffle=True, num_workers=workers)


class WeightedRegressor(pl.LightningModule):
    """Minimises the mean of w_n times the squared error; smooth, so that finite differences converge.

    Args:
        optimizer: Takes the module, returns what ``configure_optimizers`` does.
        network: Makes the network.
    """

    def __init__(self, optimizer, features=3, dtype=torch.float64, network=None):
        super().__init__()
        self.optimizer = optimizer
        nn = torch.nn
        made = nn.Sequential(nn.Linear(features, 5), nn.Tanh(), nn.Linear(5, 1)) if network is None else network()
        self.net = made.to(dtype)

    def forward(self, inputs):
        return self.net(inputs).squeeze(-1)

    def training_step(self, batch, batch_idx):
        inputs, targets, weights = batch
        loss = (weights * (self(inputs) - targets) ** 2).mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return self.optimizer(self)
