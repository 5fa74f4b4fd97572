"""Small trainings whose batches tell which examples they are made of."""

import lightning.pytorch as pl
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

EXAMPLES = 23
"""A prime, so that no batch size divides it."""

FEATURES = 3


class IndexedExamples(Dataset):
    """A regression problem whose items carry their own index."""

    def __init__(self, dtype=torch.float32):
        generator = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(EXAMPLES, FEATURES, generator=generator, dtype=dtype)
        self.targets = torch.sin(self.inputs).sum(1)

    def __len__(self):
        return EXAMPLES

    def __getitem__(self, index):
        return {"index": int(index), "inputs": self.inputs[index], "targets": self.targets[index]}


def loader(dataset=None, batch_size=4, **arguments):
    return DataLoader(dataset or IndexedExamples(), batch_size, **arguments)


def shuffled(**arguments):
    return loader(shuffle=True, **arguments)


def sgd(module):
    return torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)


def two_groups_with_a_scheduler(module):
    """The last layer first and faster; each step has a learning rate of its own."""
    optimizer = torch.optim.SGD(
        [
            {"params": module.net[3].parameters(), "lr": 0.1, "weight_decay": 0.01},
            {"params": module.net[0].parameters()},
        ],
        lr=0.03,
        momentum=0.8,
    )
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def adamw(module):
    return torch.optim.AdamW(module.parameters(), lr=0.03, betas=(0.8, 0.9), weight_decay=0.1, amsgrad=True)


class Regressor(pl.LightningModule):
    """A network that notes in ``seen`` which examples each ``training_step`` gets: a route of its own to the order.

    Args:
        optimizer: Takes the module, returns what ``configure_optimizers`` does.
        dropout: Probability; 0 leaves the random number generator alone.
    """

    def __init__(self, optimizer=sgd, dropout=0.0):
        super().__init__()
        self.optimizer = optimizer
        # no width is a multiple of a vector register's: the ends of loops are exercised too
        self.net = nn.Sequential(nn.Linear(FEATURES, 7), nn.Tanh(), nn.Dropout(dropout), nn.Linear(7, 1))
        self.seen = []

    def example_errors(self, batch):
        return (self.net(batch["inputs"]).squeeze(-1) - batch["targets"]) ** 2

    def training_step(self, batch, batch_idx):
        self.seen.append(batch["index"])
        return self.example_errors(batch).mean()

    def configure_optimizers(self):
        return self.optimizer(self)

    @property
    def seen_indices(self):
        return [indices.tolist() for indices in self.seen]


class Classifier(pl.LightningModule):
    """Classifies the examples by their index's parity, with any layers and any loss.

    Args:
        loss: Takes logits ``(B, 2)`` and labels ``(B,)``.
        layers: Put before the last linear layer.
    """

    def __init__(self, loss=functional.cross_entropy, *layers):
        super().__init__()
        self.loss = loss
        self.net = nn.Sequential(nn.Linear(FEATURES, 6), *layers, nn.Tanh(), nn.Linear(6, 2))

    def training_step(self, batch, batch_idx):
        return self.loss(self.net(batch["inputs"]), batch["index"] % 2)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def parameters_of(module):
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def assert_same(found, wanted):
    """Compare two dicts of tensors bit by bit."""
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert torch.equal(found[name], wanted[name]), (name, found[name], wanted[name])
