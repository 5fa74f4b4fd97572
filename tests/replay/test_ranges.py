"""Ranges of measurements: claimed where they are certain, and nowhere else."""

import math

import pytest
import torch
from torch.nn import functional

from lightning_dtda.errors import AttributionError
from lightning_dtda.replay.ranges import EVERYTHING, known_range

NEVER_NEGATIVE, PROBABILITY = (0.0, math.inf), (0.0, 1.0)
LABELS = torch.tensor([0, 1, 2, 0])
ZEROS = torch.zeros(4, 3)

CERTAIN = {
    "squared error": (lambda x: functional.mse_loss(x, ZEROS), NEVER_NEGATIVE),
    "squared error by hand": (lambda x: ((x - 1) ** 2).mean(), NEVER_NEGATIVE),
    "absolute error": (lambda x: functional.l1_loss(x, ZEROS), NEVER_NEGATIVE),
    "Huber loss": (lambda x: functional.smooth_l1_loss(x, ZEROS, reduction="none").mean(1)[0], NEVER_NEGATIVE),
    "cross-entropy": (lambda x: functional.cross_entropy(x, LABELS), NEVER_NEGATIVE),
    "sum of cross-entropies": (lambda x: functional.cross_entropy(x, LABELS, reduction="sum"), NEVER_NEGATIVE),
    "binary cross-entropy": (
        lambda x: functional.binary_cross_entropy_with_logits(x, ZEROS, reduction="none").sum(1)[2],
        NEVER_NEGATIVE,
    ),
    "squared error with a penalty": (
        lambda x: functional.mse_loss(x, ZEROS) / 2 + 0.01 * x.pow(2).sum(),
        NEVER_NEGATIVE,
    ),
    "probability": (lambda x: x.softmax(1)[0, 1], PROBABILITY),
    "probability from its logarithm": (lambda x: x.log_softmax(1).exp().gather(1, LABELS[:, None])[0], PROBABILITY),
    "logarithm of a probability": (lambda x: functional.logsigmoid(x).mean(), (-math.inf, 0.0)),
}

UNCERTAIN = {
    "output": lambda x: x[0, 0],
    "norm of a difference and an offset": lambda x: functional.mse_loss(x, ZEROS) - 1,
    "difference of losses": lambda x: functional.mse_loss(x, ZEROS) - functional.l1_loss(x, ZEROS),
    "loss times a negative number": lambda x: -2 * functional.mse_loss(x, ZEROS),
    "log-likelihood of a Gaussian": lambda x: functional.gaussian_nll_loss(x, ZEROS, x.exp()),
    "cube": lambda x: (x**3).sum(),
    # the weight is an advantage: positive for this query, perhaps negative for the next
    "policy gradient": lambda x: -(x.log_softmax(1)[:, 0] * torch.ones(4)).mean(),
    "ratio to a loss": lambda x: 1 / functional.mse_loss(x, ZEROS),
    "negative log-likelihood of unnormalised scores": lambda x: functional.nll_loss(x, LABELS),
    "constant": lambda x: torch.tensor(3.0),
}


def values(function, number=50):
    generator = torch.Generator().manual_seed(0)
    return [function((3 * torch.randn(4, 3, generator=generator)).requires_grad_()) for _ in range(number)]


@pytest.mark.parametrize("name", CERTAIN)
def test_a_range_that_is_certain_is_known_and_holds(name):
    function, expected = CERTAIN[name]
    found = values(function)
    assert known_range(function, found[0]) == expected
    assert all(expected[0] <= value.item() <= expected[1] for value in found)


@pytest.mark.parametrize("name", UNCERTAIN)
def test_no_range_is_claimed_that_need_not_hold(name):
    assert known_range(UNCERTAIN[name], values(UNCERTAIN[name], 1)[0]) == EVERYTHING


def test_a_measurement_may_declare_its_range():
    def accuracy(x):
        return x.sum()

    accuracy.range = (0, 1)
    assert known_range(accuracy, values(accuracy, 1)[0]) == (0.0, 1.0)
    accuracy.range = (1, 0)
    with pytest.raises(AttributionError, match=r"Give its lowest and highest value, such as \(0, math.inf\)"):
        known_range(accuracy, values(accuracy, 1)[0])
