"""A training in two processes: those that are started, not forked, import it by name."""

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.regression import WeightedRegressor, loader, weighted_data

EXAMPLES = 13
"""Odd: one of them is trained on twice in each epoch, to fill up the last batch."""


def sgd(module):
    return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)


def train(*callbacks, optimizer=sgd, network=None, weights=None, seed=3, **arguments):
    """Train in two processes, or in ``devices``, forked from this one."""
    inputs, targets, ones = weighted_data(EXAMPLES)
    data = arguments.pop("data", None) or loader(inputs, targets, ones if weights is None else weights)
    ckpt_path = arguments.pop("ckpt_path", None)
    pl.seed_everything(seed, verbose=False)
    trainer = pl.Trainer(
        callbacks=list(callbacks),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        **({"max_epochs": 3, "devices": 2, "strategy": "ddp_fork"} | arguments),
    )
    trainer.fit(WeightedRegressor(optimizer, network=network), data, ckpt_path=ckpt_path)
