"""All runs and directions of a step at once, against one run and one direction at a time."""

import logging

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import default_collate

from lightning_dtda.replay.batches import stack_leaves
from lightning_dtda.replay.stand_ins import Time
from lightning_dtda.replay.steps import MicroBatchInputs, StepBatch
from tests.replay.stacked_runs import CASES, RUNS, B, Runs, close, cross_entropy, mlp, noisy
from tests.replay.steps import CPU, Stepping


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
