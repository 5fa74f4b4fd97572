"""Trainings of the small weighted regression: optimizers, settings of the Trainer, and networks that draw or count."""

import lightning.pytorch as pl
import torch

from tests.regression import WeightedRegressor, loader


def sgd(**arguments):
    return lambda module: torch.optim.SGD(module.parameters(), lr=0.1, **arguments)


def two_groups(module):
    first, last = module.net[0], module.net[2]
    groups = [
        {"params": first.parameters(), "lr": 0.2, "weight_decay": 0.05, "momentum": 0.0},
        {"params": last.parameters(), "lr": 0.05, "momentum": 0.7, "nesterov": True},
    ]
    return torch.optim.SGD(groups, lr=0.1)


def scheduled(module):
    optimizer = torch.optim.SGD(module.parameters(), lr=0.2, momentum=0.9, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.3, total_steps=15)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def frozen(module):
    module.net[0].bias.requires_grad_(False)
    return torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1, momentum=0.5)


def of(optimizer, lr=0.02, **arguments):
    return lambda module: optimizer(module.parameters(), lr=lr, **arguments)


def adamw_scheduled(module):
    first, last = module.net[0], module.net[2]
    groups = [{"params": last.parameters(), "weight_decay": 0.2}, {"params": first.parameters(), "betas": (0.5, 0.9)}]
    optimizer = torch.optim.AdamW(groups, lr=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.03, total_steps=15)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


OPTIMIZERS = {
    "plain": sgd(),
    "momentum": sgd(momentum=0.9),
    "dampening": sgd(momentum=0.9, dampening=0.3),
    "nesterov": sgd(momentum=0.9, nesterov=True),
    "weight decay": sgd(weight_decay=0.1),
    "momentum and weight decay": sgd(momentum=0.8, weight_decay=0.1),
    "two groups": two_groups,
    "per-step schedule of rate and momentum": scheduled,
    "frozen parameter": frozen,
    "Adam": of(torch.optim.Adam),
    "Adam with weight decay and amsgrad": of(torch.optim.Adam, weight_decay=0.1, amsgrad=True),
    "AdamW": of(torch.optim.AdamW, weight_decay=0.1),
    "AdamW, two groups, per-step schedule of rate and betas": adamw_scheduled,
    "RMSprop": of(torch.optim.RMSprop),
    "RMSprop centered with momentum": of(torch.optim.RMSprop, 0.005, momentum=0.5, centered=True, weight_decay=0.1),
    "Adagrad": of(torch.optim.Adagrad, 0.1, lr_decay=0.01),
}

TRAINERS = {
    "accumulated gradients, short last group": {"accumulate_grad_batches": 2},
    "stopped in mid-epoch": {"max_steps": 7},
    "clipped by norm": {"gradient_clip_val": 0.5},
    "clipped by value": {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"},
    "accumulated and clipped by norm": {"gradient_clip_val": 0.3, "accumulate_grad_batches": 2},
}


def train(
    fit, optimizer, inputs, targets, weights, *callbacks, make=WeightedRegressor, network=None, data=None, **arguments
):
    pl.seed_everything(3, verbose=False)
    module = make(optimizer, network=network)
    fit(module, loader(inputs, targets, weights, **(data or {})), *callbacks, **({"max_epochs": 5} | arguments))
    return module


nn = torch.nn


class Tokens(nn.Module):
    """Passes each example through a layer of attention, as three tokens."""

    def __init__(self, attention, batch_first):
        super().__init__()
        self.widen, self.attention, self.read = nn.Linear(1, 4), attention, nn.Linear(12, 1)
        self.batch_first = batch_first

    def forward(self, inputs):
        tokens = self.widen(inputs.unsqueeze(-1))
        turn = (lambda each: each) if self.batch_first else (lambda each: each.transpose(0, 1))
        return self.read(turn(self.attention(turn(tokens))).flatten(1))


class SelfAttention(nn.MultiheadAttention):
    def forward(self, tokens):
        return super().forward(tokens, tokens, tokens, need_weights=True)[0]


class DroppedWeights(nn.Linear):
    """One mask for all examples of a batch."""

    def forward(self, inputs):
        return nn.functional.linear(inputs, nn.functional.dropout(self.weight, 0.3, self.training), self.bias)


def encoder(batch_first):
    return nn.TransformerEncoderLayer(4, 2, 6, dropout=0.2, activation=torch.tanh, batch_first=batch_first)


RANDOM_NETWORKS = {
    "dropout": lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Dropout(0.4), nn.Linear(5, 1), nn.Dropout(0.1)),
    "alpha dropout": lambda: nn.Sequential(nn.Linear(3, 5), nn.SELU(), nn.AlphaDropout(0.3), nn.Linear(5, 1)),
    "dropout of channels": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 6, 2), nn.Dropout1d(0.3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 1)
    ),
    "dropout of weights": lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), DroppedWeights(5, 1)),
    "attention with weights": lambda: Tokens(SelfAttention(4, 2, dropout=0.2, batch_first=True), batch_first=True),
    "a transformer": lambda: Tokens(encoder(batch_first=True), batch_first=True),
    "a transformer, tokens first": lambda: Tokens(encoder(batch_first=False), batch_first=False),
}


class TwiceNormalised(nn.Module):
    """Uses a layer of BatchNorm twice."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 5), nn.BatchNorm1d(5, momentum=0.4), nn.Linear(5, 1)

    def forward(self, inputs):
        return self.last(self.norm(torch.tanh(self.norm(self.first(inputs)))))


NORMALISED_NETWORKS = {
    "BatchNorm": lambda: nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5, momentum=0.3), nn.Tanh(), nn.Linear(5, 1)),
    "BatchNorm of channels": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 3)),
        nn.Conv1d(1, 4, 2),
        nn.BatchNorm1d(4, affine=False),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(8, 1),
    ),
    "one layer twice": TwiceNormalised,
    "with dropout": lambda: nn.Sequential(
        nn.Linear(3, 5), nn.Dropout(0.3), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 1)
    ),
}


class Tied(nn.Module):
    """Reads with the transpose of the weight that it writes with."""

    def __init__(self):
        super().__init__()
        self.write, self.read, self.out = nn.Linear(3, 5), nn.Linear(3, 5, bias=False), nn.Linear(3, 1)
        self.read.weight = self.write.weight

    def forward(self, inputs):
        return self.out(torch.tanh(self.write(inputs)) @ self.read.weight)
