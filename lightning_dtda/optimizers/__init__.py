"""Optimizer updates as pure functions with adjoints: the ground floor, used by trajectories and by replay alike.

A new optimizer is one class with the interface of :class:`~lightning_dtda.optimizers.update.Update` and one line in
``UPDATES``. The exact type counts: a subclass may compute anything.
"""

from __future__ import annotations

from lightning_dtda.optimizers.adadelta import Adadelta
from lightning_dtda.optimizers.adafactor import Adafactor
from lightning_dtda.optimizers.adagrad import Adagrad
from lightning_dtda.optimizers.adam import Adam
from lightning_dtda.optimizers.adamax import Adamax
from lightning_dtda.optimizers.asgd import ASGD
from lightning_dtda.optimizers.clipping import Clipping, clipping
from lightning_dtda.optimizers.grouped import GroupedUpdate
from lightning_dtda.optimizers.muon import Muon
from lightning_dtda.optimizers.nadam import NAdam
from lightning_dtda.optimizers.radam import RAdam
from lightning_dtda.optimizers.rmsprop import RMSprop
from lightning_dtda.optimizers.sgd import SGD
from lightning_dtda.optimizers.update import Hyperparameters, State, Update

UPDATES: dict[str, Update] = {
    "torch.optim.Adafactor": Adafactor(),
    "torch.optim.Muon": Muon(),
    "torch.optim.adadelta.Adadelta": Adadelta(),
    "torch.optim.adagrad.Adagrad": Adagrad(),
    "torch.optim.adam.Adam": Adam(decoupled=False),
    "torch.optim.adamax.Adamax": Adamax(),
    "torch.optim.adamw.AdamW": Adam(decoupled=True),
    "torch.optim.asgd.ASGD": ASGD(),
    "torch.optim.nadam.NAdam": NAdam(),
    "torch.optim.radam.RAdam": RAdam(),
    "torch.optim.rmsprop.RMSprop": RMSprop(),
    "torch.optim.sgd.SGD": SGD(),
}
"""The update of every supported optimizer, by the import path of its class."""

_SIGN = "its step is made of signs, so that a small change of a gradient changes nothing, and the derivative is zero"

NO_DERIVATIVE = {
    "LBFGS": "it evaluates the loss several times in a step, of which the last gradient alone is known",
    "Lion": _SIGN,
    "Rprop": _SIGN,
    "SignSGD": _SIGN,
    "Signum": _SIGN,
    "SparseAdam": "its gradients are sparse; take Adam, with dense embeddings (sparse=False)",
}
"""Why optimizers are not supported, by the name of their class in whatever package."""

__all__ = [
    "ASGD",
    "NO_DERIVATIVE",
    "SGD",
    "UPDATES",
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "Adamax",
    "Clipping",
    "GroupedUpdate",
    "Hyperparameters",
    "Muon",
    "NAdam",
    "RAdam",
    "RMSprop",
    "State",
    "Update",
    "clipping",
]
