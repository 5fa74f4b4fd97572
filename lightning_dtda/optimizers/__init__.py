"""Optimizer updates as pure functions with adjoints: the ground floor, used by trajectories and by replay alike.

A new optimizer is one class with the interface of :class:`~lightning_dtda.optimizers.update.Update` and one line in
``UPDATES``. The exact type counts: a subclass may compute anything.
"""

from __future__ import annotations

from lightning_dtda.optimizers.adagrad import Adagrad
from lightning_dtda.optimizers.adam import Adam
from lightning_dtda.optimizers.clipping import Clipping, clipping
from lightning_dtda.optimizers.grouped import GroupedUpdate
from lightning_dtda.optimizers.rmsprop import RMSprop
from lightning_dtda.optimizers.sgd import SGD
from lightning_dtda.optimizers.update import Hyperparameters, State, Update

UPDATES: dict[str, Update] = {
    "torch.optim.adagrad.Adagrad": Adagrad(),
    "torch.optim.adam.Adam": Adam(decoupled=False),
    "torch.optim.adamw.AdamW": Adam(decoupled=True),
    "torch.optim.rmsprop.RMSprop": RMSprop(),
    "torch.optim.sgd.SGD": SGD(),
}
"""The update of every supported optimizer, by the import path of its class."""

__all__ = [
    "SGD",
    "UPDATES",
    "Adagrad",
    "Adam",
    "Clipping",
    "GroupedUpdate",
    "Hyperparameters",
    "RMSprop",
    "State",
    "Update",
    "clipping",
]
