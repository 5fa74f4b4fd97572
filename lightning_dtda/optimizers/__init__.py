"""Optimizer updates as pure functions with adjoints, used by both trajectories and replay.

To add an optimizer, write one class with the interface of :class:`~lightning_dtda.optimizers.update.Update` and add one
line to ``UPDATES``. Optimizers are looked up by exact type, because a subclass may compute anything.
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
"""Updates of the supported optimizers, keyed by the import path of the optimizer's class."""

_SIGN = "its step uses only signs, so a small change of the gradient changes nothing and the derivative is zero"

NO_DERIVATIVE = {
    "LBFGS": "it evaluates the loss several times per step, and only the last gradient is known",
    "Lion": _SIGN,
    "Rprop": _SIGN,
    "SignSGD": _SIGN,
    "Signum": _SIGN,
    "SparseAdam": "its gradients are sparse; use Adam with dense embeddings (sparse=False)",
}
"""Reasons why optimizers are not supported, keyed by class name (from any package)."""

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
