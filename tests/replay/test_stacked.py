"""All runs and directions of a step at once, against one run and one direction at a time."""

import logging

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import default_collate

from lightning_dtda.replay.batches import stack_leaves
from lightning_dtda.replay.random_states import drawn_from
from lightning_dtda.replay.stacked import Stacked
from lightning_dtda.replay.stand_ins import Time
from lightning_dtda.replay.steps import MicroBatchInputs, StepBatch
from tests.replay.steps import CPU, Step, Stepping, normal

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


def assert_same(runs):
    found, expected = (runs.gradients(way) for way in (runs.stacked, runs.eager))
    close(found[0], expected[0])
    assert found[1].keys() == expected[1].keys()
    for name, buffer in expected[1].items():
        close(found[1][name], buffer)
    found, expected = (runs.products(way) for way in (runs.stacked, runs.eager))
    for part in ("gradient", "terms", "products"):
        close(getattr(found, part), getattr(expected, part))
    for name, cotangent in expected.statistics_cotangents.items():
        close(found.statistics_cotangents[name], cotangent)


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_a_stacked_step_is_the_eager_one(case, micro_batches):
    torch.manual_seed(0)
    loss, make = CASES[case]
    runs = Runs(Stepping(loss, net=make().double()), micro_batches)
    assert_same(runs)
    assert all(runs.traces), f"{case} was not stacked"


def test_runs_do_draw_their_own_random_numbers():
    # else the comparison above would not see that the first run's are taken for all
    runs = Runs(Stepping(noisy, net=mlp(nn.Tanh()).double()))
    states = [passes[0].states["cpu"] for passes in runs.passes]
    assert not torch.equal(states[0], states[1])
    runs.theta[:] = runs.theta[0]
    for passes in runs.passes[1:]:
        passes[0] = MicroBatchInputs(B, passes[0].time, passes[0].states, runs.passes[0][0].make)
    found = runs.gradients(runs.stacked)[0]
    assert (found[0] - found[1]).norm() > 1e-3 * found[0].norm()


class Looking(Stepping):
    """Takes its loss by its value."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss if loss.item() < 100 else 0 * loss


class Annealed(Stepping):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * (1 + self.current_epoch)


class Switched(Stepping):
    """Takes a term in after some epochs."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss if self.current_epoch < 50 else loss + self.net(batch[0]).square().mean()


class Rated(Stepping):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * self.optimizers().param_groups[0]["lr"]


class DrawingElsewhere(Stepping):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * (1 + np.random.rand())


class DependingOnValues(Stepping):
    def training_step(self, batch, batch_idx):
        outputs = self.net(batch[0])
        chosen = torch.multinomial(outputs.detach().softmax(1), 1)
        return -outputs.log_softmax(1).gather(1, chosen).mean()


EAGER = {
    "what looks at values": (Looking, "data-dependent control flow"),
    "a loss that depends on the epoch": (Annealed, "depends on the epoch, the step or the learning rate"),
    "a loss that will depend on the epoch": (Switched, "depends on the epoch, the step or the learning rate"),
    "a loss that depends on the learning rate": (Rated, "depends on the epoch, the step or the learning rate"),
    "numbers drawn by numpy": (DrawingElsewhere, "generators other than torch's"),
    "draws that depend on values": (DependingOnValues, "depend on values"),
}


@pytest.mark.parametrize(("make", "reason"), EAGER.values(), ids=EAGER)
def test_what_cannot_be_stacked_is_left_to_the_eager_way_and_said(make, reason, caplog):
    torch.manual_seed(0)
    time = Time(2, 7, 1, [{"lr": 0.3}])
    with caplog.at_level(logging.INFO, logger="lightning_dtda"):
        runs = Runs(make(cross_entropy, net=mlp(nn.Tanh()).double()), time=time)
        assert_same(runs)
    assert not any(runs.traces)
    messages = {message for message in caplog.messages if "run one by one, not stacked" in message}
    assert messages
    assert all(make.__name__ in message and reason in message for message in messages)


def test_batches_that_are_no_tensors_of_one_shape_are_left_to_the_eager_way():
    torch.manual_seed(0)

    def named(items):
        return [*default_collate(items), "a name"]

    runs = Runs(Stepping(cross_entropy, net=mlp(nn.Tanh()).double()), collate=named)
    assert_same(runs)
    assert not runs.traces


def test_each_shape_of_a_batch_is_traced_once():
    torch.manual_seed(0)
    runs = Runs(Stepping(cross_entropy, net=mlp(nn.Tanh()).double()))
    for _ in range(2):
        runs.gradients(runs.stacked)
    assert len(runs.traces) == 1
    smaller = [
        [MicroBatchInputs(3, passes[0].time, {}, lambda rows, make=passes[0].make: make(list(rows)))]
        for passes in runs.passes
    ]
    runs.batch = StepBatch.of(
        [torch.arange(3)] * RUNS, smaller, CPU, lambda _: stack_leaves([p[0].batch() for p in smaller])
    )
    runs.weights = runs.weights[:, :3]
    for _ in range(2):
        close(runs.gradients(runs.stacked)[0], runs.gradients(runs.eager)[0])
    assert len(runs.traces) == 2


def test_the_module_is_as_it_was_after_a_trace():
    torch.manual_seed(0)
    runs = Runs(Stepping(cross_entropy, net=mlp(nn.BatchNorm1d(5), nn.Tanh()).double()))
    module = runs.step.replica.module
    parameters, buffers = list(module.parameters()), list(module.buffers())
    before = torch.get_rng_state()
    runs.products(runs.stacked)
    assert all(one is other for one, other in zip(module.parameters(), parameters, strict=True))
    assert len(list(module.buffers())) == len(buffers)
    assert torch.equal(torch.get_rng_state(), before)


def test_single_precision_is_stacked_up_to_its_rounding():
    torch.manual_seed(0)
    runs = Runs(Stepping(cross_entropy, net=mlp(nn.Tanh(), nn.Dropout(0.3)).double()))
    double = runs.products(runs.eager)
    module = Stepping(cross_entropy, net=mlp(nn.Tanh(), nn.Dropout(0.3)))
    single = Runs(module, collate=lambda items: [default_collate(items)[0].float(), default_collate(items)[1]])
    single.theta, single.directions = runs.theta.float(), runs.directions.float()
    found = single.products(single.stacked)
    assert all(single.traces)
    for part in ("gradient", "terms", "products"):
        expected = single.products(single.eager)
        torch.testing.assert_close(getattr(found, part), getattr(expected, part), rtol=1e-4, atol=1e-5)
    assert double.gradient.dtype == torch.float64
    assert found.gradient.dtype == torch.float32
