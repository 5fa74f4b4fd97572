"""Trained runs small enough for every matrix to be written out."""

import lightning.pytorch as pl
import torch
from torch.func import functional_call
from torch.utils.data import TensorDataset

from lightning_dtda.estimators.objective import Objective
from lightning_dtda.replay import Replay, training_examples

EXAMPLES = 14

TOLERANCE = 1e-8  # relative: what is asked of the Gram matrix's solutions; reached: about 1e-11


class Classifier(pl.LightningModule):
    """Smooth, three classes; weight decay is part of the objective."""

    def __init__(self, weight_decay=0.0, network=None, decayed_bias=True):
        super().__init__()
        nn = torch.nn
        made = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)) if network is None else network()
        self.net = made.double()
        self.weight_decay = weight_decay
        self.decayed_bias = decayed_bias

    def forward(self, inputs):
        return self.net(inputs)

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        parameters = list(self.parameters())
        if self.decayed_bias:
            return torch.optim.SGD(parameters, lr=0.2, weight_decay=self.weight_decay)
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
        ]
        return torch.optim.SGD(groups, lr=0.2)


class Regressor(Classifier):
    """Two outputs, squared error."""

    def __init__(self, weight_decay=0.0, network=None, decayed_bias=True):
        nn = torch.nn
        super().__init__(
            weight_decay,
            network or (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))),
            decayed_bias,
        )

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.mse_loss(self(batch[0]), batch[1])


def data_for(module, examples=EXAMPLES, shape=(4,)):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(examples, *shape, generator=generator, dtype=torch.float64)
    if isinstance(module, Regressor):
        return TensorDataset(inputs, torch.stack([inputs.flatten(1)[:, 0].sin(), inputs.flatten(1)[:, 1]], 1))
    return TensorDataset(inputs, inputs.flatten(1)[:, :3].argmax(1))


class Trained:
    """A run, with the mean loss as a plain function of the flat parameters beside it."""

    def __init__(self, ensemble, module, data):
        self.ensemble, self.module, self.data = ensemble, module, data
        self.replay = Replay(list(ensemble), module, training_examples(data))
        self.names = self.replay.layout.names
        self.theta = self.replay.checkpoint(self.replay.steps)[0][0]

    def objective(self, memory=1e9, **arguments):
        return Objective(self.replay, memory=memory, **arguments)

    def outputs(self, theta):
        parameters = self.replay.layout.unflatten(theta)
        return functional_call(self.module.eval(), parameters, (self.data.tensors[0],))

    def loss_of(self, outputs):
        function = torch.nn.functional
        return (function.mse_loss if isinstance(self.module, Regressor) else function.cross_entropy)(
            outputs, self.data.tensors[1]
        )

    def loss(self, theta):
        return self.loss_of(self.outputs(theta))

    def losses(self, theta):
        function, (_, targets) = torch.nn.functional, self.data.tensors
        outputs = self.outputs(theta)
        if isinstance(self.module, Regressor):
            return ((outputs - targets) ** 2).mean(1)
        return function.cross_entropy(outputs, targets, reduction="none")

    @property
    def penalty(self):
        """What weight decay adds to the Hessian, from the recorded hyperparameters."""
        groups = self.ensemble[0].hyperparameters(0)
        parts = [
            torch.full((part.stop - part.start,), float(group["weight_decay"]), dtype=torch.float64)
            for part, group in zip(self.replay.layout.group_slices, groups, strict=True)
        ]
        return torch.cat(parts)

    def hessian(self):
        """The Hessian, written out."""
        return torch.func.hessian(self.loss)(self.theta) + torch.diag(self.penalty)

    def gauss_newton(self):
        """The Gauss-Newton matrix, written out: J^T H_out J with the Hessian of the whole loss by all outputs."""
        jacobian = torch.func.jacrev(self.outputs)(self.theta).flatten(0, 1)
        outputs = self.outputs(self.theta)
        of_outputs = torch.func.hessian(self.loss_of)(outputs).reshape(len(jacobian), len(jacobian))
        return jacobian.T @ of_outputs @ jacobian + torch.diag(self.penalty)


def close(found, expected, tolerance=TOLERANCE):
    torch.testing.assert_close(found, expected, rtol=0, atol=float(tolerance * expected.abs().max()))
