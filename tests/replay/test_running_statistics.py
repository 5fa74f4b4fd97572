"""The running statistics of BatchNorm: what a pass makes of them, and how all else depends on them."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from lightning_dtda.replay import Draws
from lightning_dtda.replay.examples import Examples
from lightning_dtda.replay.measuring import measure_with_gradients
from lightning_dtda.replay.running_statistics import RunningStatistics
from lightning_dtda.replay.stand_ins import Time
from lightning_dtda.replay.steps import StepBatch
from tests.replay.steps import Step, Stepping, normal

B, F = 6, 3
H = 1e-5
"""Of finite differences, whose error is of second order: 1e-9 of the largest entry is reached."""


def images(examples, *shape):
    return list(zip(normal(examples, *shape), torch.arange(examples) % 2, strict=True))


class Twice(nn.Module):
    """Normalises twice with one layer."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(F, 4), nn.BatchNorm1d(4, momentum=0.3), nn.Linear(4, 2)

    def forward(self, inputs):
        return self.last(self.norm(torch.tanh(self.norm(self.first(inputs)))))


def convolutional(norm, channels=1):
    return nn.Sequential(nn.Conv2d(channels, 3, 2), norm, nn.Tanh(), nn.Flatten(), nn.Linear(12, 2))


NETWORKS = {
    "1d": (lambda: nn.Sequential(nn.Linear(F, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)), images(B, F)),
    "2d, without weights": (lambda: convolutional(nn.BatchNorm2d(3, affine=False, eps=1e-2)), images(B, 1, 3, 3)),
    "the mean over all batches": (lambda: convolutional(nn.BatchNorm2d(3, momentum=None)), images(B, 1, 3, 3)),
    "one layer twice": (Twice, images(B, F)),
    "two layers": (
        lambda: nn.Sequential(nn.BatchNorm1d(F, momentum=0.5), nn.Linear(F, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)),
        images(B, F),
    ),
}


def loss(module, batch):
    return functional.cross_entropy(module.net(batch[0]), batch[1])


class Case(Step):
    """A step of a network whose running statistics are not those that it was made with."""

    def __init__(self, name):
        torch.manual_seed(0)
        make, items = NETWORKS[name]
        net = make().double()
        super().__init__(Stepping(loss, net=net), items)
        generator = torch.Generator().manual_seed(1)
        for name in self.names_of_statistics:
            like = self.buffers[name]
            self.buffers[name] = torch.rand(like.shape, generator=generator, dtype=like.dtype) + 0.5
        for name in self.buffers:
            if name.endswith("num_batches_tracked"):
                self.buffers[name] = torch.tensor(3)
        self.v = normal(len(self.theta), seed=5)
        self.mu = self.random(6)

    @property
    def names_of_statistics(self):
        return self.eager.statistics.names

    def random(self, seed):
        return {name: normal(*self.buffers[name].shape, seed=seed) for name in self.names_of_statistics}

    def torchs_own(self, theta=None, statistics=None):
        """Buffers after the pass, as torch leaves them."""
        module = self.replica.module
        self.replica.load(self.theta if theta is None else theta, self.buffers | (statistics or {}))
        for name, buffer in module.named_buffers():
            owner, key = self.replica._owners[name]
            owner._buffers[key] = buffer.clone()
        with torch.no_grad():
            module.train().training_step(self.collate(self.items), 0)
        return {name: buffer.clone() for name, buffer in module.named_buffers()}

    def difference(self, function, direction, along):
        """A central difference of statistics after the pass, along directions of parameters and statistics before."""
        found = []
        for sign in (1, -1):
            statistics = {name: self.buffers[name] + sign * H * part for name, part in along.items()}
            found.append(function(self.theta + sign * H * direction, statistics))
        return {name: (found[0][name] - found[1][name]) / (2 * H) for name in self.names_of_statistics}


@pytest.fixture(params=NETWORKS)
def case(request):
    return Case(request.param)


def close(found, expected, tolerance=1e-8):
    torch.testing.assert_close(found, expected, rtol=0, atol=float(tolerance * expected.abs().max()))


def test_statistics_after_a_pass_are_those_that_torch_leaves(case):
    expected = case.torchs_own()
    with case.passed() as one:
        assert sorted(one.statistics) == sorted(case.names_of_statistics)
        for name, statistic in one.statistics.items():
            close(statistic, expected[name], 1e-13)
            assert not torch.equal(statistic, case.buffers[name])
    updated = case.eager.gradient(case.batch(), case.theta[None], {name: b[None] for name, b in case.buffers.items()})[
        1
    ]
    for name, buffer in updated.items():
        torch.testing.assert_close(buffer[0], expected[name], rtol=1e-13, atol=0)


def test_the_callers_buffers_are_left_alone(case):
    before = {name: buffer.clone() for name, buffer in case.buffers.items()}
    case.gradient()
    for name, buffer in before.items():
        assert torch.equal(case.buffers[name], buffer)


def test_tangents_are_differences_of_torchs_own_statistics(case):
    along = case.random(7)
    with case.passed() as one:
        found = one.statistics_along(case.split(case.v), along)
    expected = case.difference(case.torchs_own, case.v, along)
    for name in case.names_of_statistics:
        close(found[name], expected[name])


def test_cotangents_are_the_transpose_of_tangents(case):
    along, nothing = case.random(7), torch.zeros_like(case.theta)
    of_parameters, terms, of_statistics = case.products(nothing, case.mu)
    with case.passed() as one:
        forwards = one.statistics_along(case.split(case.v), along)
    pulled = of_parameters @ case.v + sum((of_statistics[name] * along[name]).sum() for name in along)
    pushed = sum((case.mu[name] * forwards[name]).sum() for name in along)
    torch.testing.assert_close(pulled, pushed, rtol=1e-12, atol=1e-13)
    assert not terms.any()  # weights act on the gradient alone


def test_cotangents_are_added_to_the_hessians_product(case):
    both, terms, _ = case.products(case.v, case.mu)
    alone, terms_alone, _ = case.products(case.v)
    statistics, _, _ = case.products(torch.zeros_like(case.v), case.mu)
    close(both, alone + statistics, 1e-12)
    close(terms, terms_alone, 1e-13)


def test_layers_in_evaluation_mode_or_without_statistics_have_none():
    module = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3).eval(), nn.BatchNorm1d(3, track_running_stats=False))
    assert RunningStatistics(module).names == ["0.running_mean", "0.running_var"]


def test_the_modules_hooks_are_gone_afterwards(case):
    with case.passed():
        pass
    assert not any(layer._forward_pre_hooks for layer in case.replica.module.modules())


def prediction(module, batch):
    return module.net(batch[0])[:, 0] * module.net(batch[0]).sin().sum(1)


def asked(case, theta=None, statistics=None):
    """A measurement of two of the items, its gradient, and its derivatives by running statistics."""
    buffers = case.buffers | (statistics or {})
    return measure_with_gradients(
        case.eager,
        (case.theta if theta is None else theta)[None],
        {name: buffer[None] for name, buffer in buffers.items()},
        Examples(case.items, case.collate),
        [1, 4],
        prediction,
        ["here"],
        Time(),
        Draws(1),
    )


def test_a_measurement_is_that_in_evaluation_mode(case):
    values, _, _ = asked(case)
    case.replica.load(case.theta, case.buffers)
    module = case.replica.module.eval()
    with torch.no_grad():
        expected = prediction(module, case.collate([case.items[1], case.items[4]]))
    torch.testing.assert_close(values[0], expected, rtol=1e-12, atol=1e-13)


def test_a_measurement_changes_with_the_running_statistics(case):
    _, gradients, of_statistics = asked(case)
    along = case.random(7)
    moved = []
    for sign in (1, -1):
        statistics = {name: case.buffers[name] + sign * H * part for name, part in along.items()}
        moved.append(asked(case, case.theta + sign * H * case.v, statistics)[0][0])
    found = gradients[0] @ case.v
    for name, part in along.items():
        found = found + (of_statistics[name][0] * part).flatten(1).sum(1)
    close(found, (moved[0] - moved[1]) / (2 * H))
    assert all(of_statistics[name].any() for name in along)


def test_in_a_step_of_several_micro_batches_the_statistics_go_from_one_to_the_next():
    case = Case("1d")
    parts = [[0, 1, 2], [3, 4, 5]]
    batch = StepBatch.of([torch.arange(B)], [[case.inputs(part, factor=0.5) for part in parts]], torch.device("cpu"))
    buffers = {name: buffer[None] for name, buffer in case.buffers.items()}
    after = case.eager.gradient(batch, case.theta[None], buffers)[1]
    module = case.replica.module
    case.replica.load(case.theta, case.buffers)
    with torch.no_grad():
        for part in parts:
            module.train().training_step(case.collate([case.items[n] for n in part]), 0)
    for name, buffer in module.named_buffers():
        torch.testing.assert_close(after[name][0], buffer, rtol=1e-13, atol=0)

    along = case.random(7)
    tangents = case.eager.statistics_along(
        batch,
        case.theta[None],
        buffers,
        case.v[None, None],
        {name: part[None, None] for name, part in along.items()},
    )

    def statistics(theta, statistics):
        moved = buffers | {name: part[None] for name, part in statistics.items()}
        return {name: part[0] for name, part in case.eager.gradient(batch, theta[None], moved)[1].items()}

    expected = case.difference(statistics, case.v, along)
    for name, part in tangents.items():
        close(part[0, 0], expected[name])
    cotangents = {name: part[None, None] for name, part in case.mu.items()}
    found = case.eager.products(batch, case.theta[None], buffers, torch.zeros(1, 1, len(case.v)).double(), cotangents)
    pulled = found.products[0, 0] @ case.v
    pulled += sum((found.statistics_cotangents[name][0, 0] * along[name]).sum() for name in along)
    pushed = sum((case.mu[name] * tangents[name][0, 0]).sum() for name in along)
    torch.testing.assert_close(pulled, pushed, rtol=1e-12, atol=1e-13)
