"""One step of a module, replayed without any training."""

import lightning.pytorch as pl
import torch
from torch.utils.data import default_collate

from lightning_dtda.replay.eager import Eager
from lightning_dtda.replay.replica import Replica
from lightning_dtda.replay.stand_ins import Circumstances, Time
from lightning_dtda.replay.steps import MicroBatchInputs, StepBatch
from lightning_dtda.trajectory import ParameterLayout

CPU = torch.device("cpu")


class Stepping(pl.LightningModule):
    """A module whose loss is any function of it and of a batch.

    Args:
        loss: Takes the module and the batch.
        submodules: By name.
    """

    def __init__(self, loss, **submodules):
        super().__init__()
        self.loss = loss
        for name, submodule in submodules.items():
            setattr(self, name, submodule)

    def training_step(self, batch, batch_idx):
        return self.loss(self, batch)


def layout_of(module):
    named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    return ParameterLayout(
        tuple(name for name, _ in named), tuple(tuple(parameter.shape) for _, parameter in named), (len(named),)
    )


class Step:
    """A module's pass of a batch, to be replayed.

    Args:
        module: The module.
        items: Of the batch.
        collate: Makes the batch.
        states: Of the random number generators before the pass; those that there are if not given.
        time: The Trainer's.
        circumstances: Further ones.
        arguments: Of the replica.
    """

    def __init__(self, module, items, collate=default_collate, states=None, time=None, circumstances=None, **arguments):
        self.items = list(items)
        self.collate = collate
        dtype = arguments.pop("dtype", next(module.parameters()).dtype)
        updated = [name for name, _ in module.named_buffers()]
        facts = Circumstances(updated_buffers=updated, **(circumstances or {}))
        self.replica = Replica(module, layout_of(module), facts, dtype, CPU, **arguments)
        self.eager = Eager(self.replica)
        self.layout = self.replica.layout
        self.theta = self.layout.flatten([module.get_parameter(name) for name in self.layout.names]).to(dtype)
        self.buffers = {name: buffer.clone() for name, buffer in self.replica.module.named_buffers()}
        self.states = self.replica.generators.states() if states is None else states
        self.time = time or Time()

    @property
    def names(self):
        return list(self.layout.names)

    def inputs(self, rows=None, **arguments):
        """The micro-batch of some of the items."""
        rows = list(range(len(self.items))) if rows is None else rows
        return MicroBatchInputs(
            len(rows),
            self.time,
            self.states,
            lambda some: self.collate([self.items[rows[row]] for row in some]),
            **arguments,
        )

    def passed(self, weights=None, rows=None, theta=None, buffers=None, **arguments):
        return self.eager.passed(
            self.inputs(rows),
            self.theta if theta is None else theta,
            self.buffers if buffers is None else buffers,
            weights,
            **arguments,
        )

    def gradient(self, weights=None, rows=None, theta=None):
        """The gradient ``(P,)`` with weights of the batch's examples."""
        with self.passed(weights, rows, theta, create_graph=False) as one:
            return self.layout.flatten(one.gradient)

    def cut(self, rows=None):
        """Shapes of the tensors at which weights act, and how the examples lie in each."""
        with self.passed(rows=rows) as one:
            return [(tuple(tensor.node._input_metadata[tensor.output].shape), tensor.rows) for tensor in one._cut]

    def products(self, direction, cotangents=None):
        """H v, the examples' terms, and the cotangents of running statistics."""
        with self.passed() as one:
            curved, terms, statistics = one.products(self.split(direction), cotangents)
            return self.layout.flatten(curved), terms, statistics

    def split(self, vector):
        return list(self.layout.unflatten(vector).values())

    def batch(self, runs=1, **arguments):
        """The step as one of some runs."""
        indices = [torch.arange(len(self.items))] * runs
        return StepBatch.of(indices, [[self.inputs(**arguments)]] * runs, CPU)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
