"""A step of several runs, with networks and losses of every kind."""

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import default_collate

from lightning_dtda.replay.batches import stack_leaves
from lightning_dtda.replay.random_states import drawn_from
from lightning_dtda.replay.stacked import Stacked
from lightning_dtda.replay.steps import MicroBatchInputs, StepBatch
from tests.replay.steps import CPU, Step, normal

B, F, RUNS, QUERIES = 4, 3, 3, 2
EXACT = 1e-10  # relative; the same operations, mapped, in double precision


def cross_entropy(module, batch):
    return functional.cross_entropy(module.net(batch[0]), batch[1])


def noisy(module, batch):
    return functional.cross_entropy(module.net(batch[0] + 0.1 * torch.randn_like(batch[0])), batch[1])


def mixed_up(module, batch):
    share, other = torch.rand(len(batch[0]), 1, dtype=batch[0].dtype), torch.randperm(len(batch[0]))
    outputs = module.net(share * batch[0] + (1 - share) * batch[0][other])
    losses = functional.cross_entropy(outputs, batch[1], reduction="none")
    return (share[:, 0] * losses).mean()


def mlp(*layers):
    return nn.Sequential(nn.Linear(F, 5), *layers, nn.Linear(5, 2))


def convolutional(norm):
    return nn.Sequential(nn.Unflatten(1, (1, F)), nn.Conv1d(1, 4, 2), norm, nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cells, self.last = nn.LSTM(1, 3, batch_first=True), nn.Linear(3, 2)

    def forward(self, inputs):
        return self.last(self.cells(inputs.unsqueeze(-1))[0][:, -1])


class GPT(nn.Module):
    """Attention between tokens at places, as nanoGPT has it."""

    def __init__(self, is_causal):
        super().__init__()
        self.tokens, self.places = nn.Embedding(2, 4), nn.Embedding(F, 4)
        self.before, self.widen, self.last = nn.LayerNorm(4), nn.Linear(4, 12), nn.Linear(4, 2)
        self.is_causal = is_causal

    def forward(self, inputs):
        hidden = self.before(self.tokens((inputs > 0).long()) + self.places(torch.arange(F)))
        parts = (part.unflatten(2, (2, -1)).transpose(1, 2) for part in self.widen(hidden).chunk(3, 2))
        attended = functional.scaled_dot_product_attention(*parts, is_causal=self.is_causal)
        return self.last((hidden + attended.transpose(1, 2).flatten(2)).mean(1))


CASES = {
    "MLP": (cross_entropy, lambda: mlp(nn.Tanh())),
    "dropout": (cross_entropy, lambda: mlp(nn.Tanh(), nn.Dropout(0.4))),
    "alpha dropout": (cross_entropy, lambda: mlp(nn.SELU(), nn.AlphaDropout(0.3))),
    "noise in the step": (noisy, lambda: mlp(nn.Tanh())),
    "mixup": (mixed_up, lambda: mlp(nn.Tanh())),
    "BatchNorm": (cross_entropy, lambda: convolutional(nn.BatchNorm1d(4, momentum=0.3))),
    "BatchNorm and dropout": (cross_entropy, lambda: mlp(nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.3))),
    "GroupNorm": (cross_entropy, lambda: convolutional(nn.GroupNorm(2, 4))),
    "PReLU": (cross_entropy, lambda: mlp(nn.PReLU(5))),
    "LSTM": (cross_entropy, Recurrent),
    "embeddings and attention": (cross_entropy, lambda: GPT(is_causal=False)),
    "embeddings and causal attention": (cross_entropy, lambda: GPT(is_causal=True)),
}


class Runs:
    """A step of several runs, each with parameters, examples and random numbers of its own."""

    def __init__(self, module, micro_batches=1, time=None, collate=default_collate):
        self.step = Step(module, [], time=time)
        self.eager, self.stacked = self.step.eager, Stacked(self.step.eager)
        count = micro_batches * B
        self.passes = [self._passes(run, micro_batches, collate) for run in range(RUNS)]
        self.batch = StepBatch.of([torch.arange(count)] * RUNS, self.passes, CPU, self._leaves)
        size = len(self.step.theta)
        self.theta = self.step.theta + 0.1 * normal(RUNS, size, seed=2)
        self.buffers = {
            name: torch.stack([buffer + run if buffer.is_floating_point() else buffer for run in range(RUNS)])
            for name, buffer in self.step.buffers.items()
        }
        self.weights = normal(RUNS, count, seed=3)
        self.directions = normal(RUNS, QUERIES, size, seed=4)
        self.cotangents = {
            name: normal(RUNS, QUERIES, *self.buffers[name].shape[1:], seed=5) for name in self.eager.statistics.names
        }

    def _passes(self, run, micro_batches, collate):
        passes = []
        for number in range(micro_batches):
            inputs = normal(B, F, seed=10 * run + number)
            items = list(zip(inputs, (inputs[:, 0] > 0).long(), strict=True))
            generators = self.step.replica.generators
            with generators.kept():
                generators.seed(run + 100 * number)
                before = generators.states()
                with self.step.replica.passing():
                    self.step.replica.training_loss(collate(items), self.step.time)
                drawn = drawn_from(before, generators.states())  # as a record has them
            passes.append(
                MicroBatchInputs(
                    B,
                    self.step.time,
                    drawn,
                    lambda rows, items=items: collate([items[row] for row in rows]),
                    1 / micro_batches,
                )
            )
        return passes

    def _leaves(self, number):
        return stack_leaves([passes[number].batch() for passes in self.passes])

    def gradients(self, way):
        return way.gradient(self.batch, self.theta, self.buffers, self.weights)

    def products(self, way):
        return way.products(self.batch, self.theta, self.buffers, self.directions, self.cotangents)

    @property
    def traces(self):
        return [trace is not None for trace in self.stacked._traces.values()]


def close(found, expected):
    scale = float(expected.double().abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=EXACT * scale)
