"""What is measured of models: one by one or all at once, in evaluation mode, and over draws where it is random."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import TensorDataset

from lightning_dtda.errors import AttributionError
from lightning_dtda.replay import Draws, measurements
from lightning_dtda.replay.examples import Examples
from lightning_dtda.replay.measuring import measure, measure_with_gradients, nature
from lightning_dtda.replay.stand_ins import Time
from tests.replay.steps import Step, Stepping, normal

RUNS, QUERIES, F = 3, 4, 3
ITEMS = list(zip(normal(QUERIES, F), torch.arange(QUERIES) % 2, strict=True))


class Items(torch.utils.data.Dataset):
    def __len__(self):
        return QUERIES

    def __getitem__(self, index):
        return ITEMS[index]


def prediction(module, batch):
    return module.net(batch[0])[:, 0]


def looking(module, batch):
    value = prediction(module, batch)
    return value if value.item() > 0 else 3 * value


def noisy(module, batch):
    return prediction(module, [batch[0] + torch.randn_like(batch[0]) + np.random.rand()])


class Models:
    """Some models of one network, and queries."""

    def __init__(self, loss=None):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(F, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 2)).double()
        loss = loss or (lambda module, batch: functional.cross_entropy(module.net(batch[0]), batch[1]))
        self.step = Step(Stepping(loss, net=net), ITEMS)
        self.theta = self.step.theta + 0.3 * normal(RUNS, len(self.step.theta), seed=2)
        self.buffers = {
            name: torch.stack([buffer + 0.5 * run if buffer.is_floating_point() else buffer for run in range(RUNS)])
            for name, buffer in self.step.buffers.items()
        }

    def derivatives(self, measurement, draws=None, numbers=range(QUERIES)):
        where = [f"run {run}" for run in range(RUNS)]
        return measure_with_gradients(
            self.step.eager,
            self.theta,
            self.buffers,
            Examples(Items()),
            numbers,
            measurement,
            where,
            Time(),
            draws or Draws(3),
        )

    def measure(self, measurement, draws=None):
        return measure(
            self.step.eager, self.theta, self.buffers, Examples(Items()), measurement, Time(), draws or Draws(3)
        )

    def by_hand(self, function):
        """The measurement of each query by each model in evaluation mode, one at a time."""
        module = self.step.replica.module.eval()
        found = torch.empty(RUNS, QUERIES, dtype=torch.float64)
        for run in range(RUNS):
            self.step.replica.load(self.theta[run], {name: buffer[run] for name, buffer in self.buffers.items()})
            for query in range(QUERIES):
                with torch.no_grad():
                    found[run, query] = function(module, self.step.collate([ITEMS[query]]), query)
        module.train()
        return found


@pytest.mark.parametrize("measurement", [prediction, looking])
def test_it_is_that_of_each_query_by_each_model(measurement):
    models = Models()
    expected = models.by_hand(lambda module, batch, _: measurement(module, batch)[0])
    for found in (models.measure(measurement), models.derivatives(measurement)[0]):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


class Largest(TorchDispatchMode):
    """Keeps the number of elements of the largest tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        found = function(*arguments, **(options or {}))
        if isinstance(found, torch.Tensor):
            self.elements = max(self.elements, found.numel())
        return found


def test_weights_are_not_copied_for_each_query():
    queries, wide = 32, 50
    data = TensorDataset(normal(queries, wide), torch.zeros(queries, dtype=torch.long))
    step = Step(Stepping(lambda module, batch: module.net(batch[0]).mean(), net=nn.Linear(wide, 2).double()), data)
    theta = step.theta + normal(RUNS, len(step.theta), seed=2)
    with Largest() as largest:
        found = measure(step.eager, theta, {}, Examples(data), prediction, Time(), Draws())
    assert found.shape == (RUNS, queries)
    assert largest.elements < queries * theta.numel() // 2


def test_the_loss_is_that_of_the_training_step():
    models = Models()
    expected = models.by_hand(lambda module, batch, _: functional.cross_entropy(module.net(batch[0]), batch[1]))
    torch.testing.assert_close(models.measure(measurements.loss), expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(models.derivatives(measurements.loss)[0], expected, rtol=1e-12, atol=1e-13)


def test_gradients_are_differences_of_values():
    models, h = Models(), 1e-6
    _, gradients, _ = models.derivatives(prediction)
    direction = normal(RUNS, len(models.step.theta), seed=7)
    moved = []
    for sign in (1, -1):
        models.theta = models.theta + sign * h * direction * (1 if sign == 1 else 2)
        moved.append(models.measure(prediction))
    difference = (moved[0] - moved[1]) / (2 * h)
    torch.testing.assert_close((gradients @ direction[..., None])[..., 0], difference, rtol=1e-6, atol=1e-8)


def test_some_of_the_queries_are_those_of_all():
    models = Models()
    whole, part = models.derivatives(prediction), models.derivatives(prediction, numbers=[3, 1])
    assert torch.equal(part[0], whole[0][:, [3, 1]])
    assert torch.equal(part[1], whole[1][:, [3, 1]])


def test_a_random_one_is_the_mean_over_draws_that_are_the_same_for_every_model():
    models, draws = Models(), Draws(5, seed=3)

    def by_hand(module, batch, query):
        total = 0.0
        for seed in draws.of(query):
            torch.manual_seed(seed)
            np.random.seed(seed)
            total += float(noisy(module, batch)[0]) / 5
        return total

    expected = models.by_hand(by_hand)
    for found in (models.measure(noisy, draws), models.derivatives(noisy, draws)[0]):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    assert len({seed for query in range(QUERIES) for seed in draws.of(query)}) == 5 * QUERIES
    assert not torch.allclose(models.measure(noisy, Draws(5, seed=4)), expected)


def test_what_draws_nothing_is_taken_once():
    models, calls = Models(), []

    def counted(module, batch):
        calls.append(1)
        return looking(module, batch)

    models.derivatives(counted, Draws(50))
    assert len(calls) == RUNS * QUERIES


def test_whether_it_is_random_is_seen():
    models = Models()
    found = [nature(models.step.eager, Examples(Items()), one, Time()).is_random for one in (prediction, noisy)]
    assert found == [False, True]


def test_nothing_that_is_drawn_is_missed_afterwards():
    models = Models()
    torch.manual_seed(1)
    np.random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    models.derivatives(noisy)
    models.measure(noisy)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]


FAILING = {
    "several numbers": (lambda module, batch: module.net(batch[0])[0], r"returned shape \(2,\) for one query"),
    "no number": (lambda module, batch: prediction(module, batch) / 0 * 0, "^The measurement is not finite at run 0"),
    "no derivative": (
        lambda module, batch: (prediction(module, batch) - prediction(module, batch).detach()).sqrt(),
        "^The gradient of the measurement is not finite at run 0",
    ),
    "an error": (lambda module, batch: batch["labels"], r"measurement fails \(TypeError"),
}


@pytest.mark.parametrize(("measurement", "message"), FAILING.values(), ids=FAILING)
def test_what_is_no_measurement_is_refused(measurement, message):
    with pytest.raises(AttributionError, match=message):
        Models().derivatives(measurement)


@pytest.mark.parametrize("number", [0, -1, 2.5, True])
def test_a_number_of_draws_that_is_none_is_refused(number):
    with pytest.raises(AttributionError, match="give a positive integer"):
        Draws(number)
