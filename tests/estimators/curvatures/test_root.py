"""The root of the Gauss-Newton matrix, and its columns that are never written out, against the matrix written out."""

import pytest
import torch
from torch import nn

from lightning_dtda.estimators.curvatures import root
from lightning_dtda.estimators.curvatures.diagonal import gauss_newton_diagonal
from lightning_dtda.estimators.curvatures.root import Root
from lightning_dtda.execution.memory import peak_memory
from tests.estimators.small_runs import Classifier, Regressor

TOLERANCE = 1e-11  # relative, double precision; reached: about 1e-15


class TiedAutoencoder(nn.Module):
    """The decoder has the encoder's weight, transposed: no derivative by it is one outer product."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(4, 5)
        self.last = nn.Linear(4, 3)

    def forward(self, inputs):
        return self.last(nn.functional.linear(self.encoder(inputs).tanh(), self.encoder.weight.T))


class Positions(nn.Module):
    """The first layer sees each of two positions, the second their mean."""

    def __init__(self):
        super().__init__()
        self.each = nn.Linear(2, 5)
        self.last = nn.Linear(5, 3)

    def forward(self, inputs):
        return self.last(self.each(inputs.unflatten(1, (2, 2))).tanh().mean(1))


class Twice(nn.Module):
    """One layer is called twice."""

    def __init__(self):
        super().__init__()
        self.again = nn.Linear(4, 4)
        self.last = nn.Linear(4, 3, bias=False)

    def forward(self, inputs):
        return self.last(self.again(self.again(inputs).tanh()).tanh())


def convolutional():
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, 2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(27, 3)
    )


# with the number of layers whose columns are outer products
CASES = {
    "classifier": (Classifier, 2),
    "regressor": (Regressor, 2),
    "convolutions": (lambda: Classifier(network=convolutional), 1),
    "a weight that is used elsewhere too": (lambda: Classifier(network=TiedAutoencoder), 1),
    "several positions": (lambda: Classifier(network=Positions), 1),
    "a layer that is called twice": (lambda: Classifier(network=Twice), 1),
}


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=float(TOLERANCE * expected.abs().max()))


# the others have fewer columns than factors, and are kept where these are
STREAMED = ["a weight that is used elsewhere too", "several positions", "a layer that is called twice"]


@pytest.mark.parametrize(
    ("case", "is_kept"), [*((case, True) for case in CASES), *((case, False) for case in STREAMED)]
)
def test_products_and_gram_matrix_are_those_of_one_root(trained, monkeypatch, case, is_kept):
    make, layers = CASES[case]
    run = trained(make())
    objective = run.objective()
    if not is_kept:
        # room for the factors, and for two of the other columns at a time
        rows = objective.examples * objective.outputs
        factors = _factors(Root(objective))
        monkeypatch.setattr(root, "_SHARE", 8 * max(2 * factors, factors + 2 * rows) / objective.memory)
    monkeypatch.setattr(root, "_LARGEST", 150)  # two or three vectors at a time
    found = Root(objective)
    assert found.is_kept == is_kept
    assert len(found._kept[0]) == layers
    written_out = found.times(torch.eye(objective.size, dtype=torch.float64))
    close(written_out.T @ written_out / objective.examples, run.gauss_newton())
    close(found.transposed(torch.eye(len(written_out), dtype=torch.float64)), written_out)
    everything = torch.ones(objective.size, dtype=torch.bool)
    close(found.gram(everything), written_out @ written_out.T)
    assert found.trace() == pytest.approx(float(run.gauss_newton().trace()), rel=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_the_diagonal_is_that_of_the_matrix(trained, case):
    run = trained(CASES[case][0]())
    objective = run.objective()
    close(gauss_newton_diagonal(objective), run.gauss_newton().diagonal())


def _factors(found):
    """How many numbers the factors have."""
    return sum(layer.derivatives.numel() + layer.inputs.numel() for layer in found._kept[0])


def wide():
    return nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 3))


def test_columns_of_some_parameters_take_the_memory_of_these_alone(trained):
    objective = trained(Classifier(network=wide)).objective()
    ends = torch.tensor(objective.layout.sizes).cumsum(0)
    columns = torch.cat([torch.arange(ends[layer], ends[layer + 1]) for layer in (0, 2)])[::2]  # of two biases
    whole, some = (torch.cat([part.rows for part in objective.roots(chosen)]) for chosen in (None, columns))
    close(some, whole[:, columns])
    of_whole, of_some = (
        peak_memory(lambda chosen=chosen: list(objective.roots(chosen)), whole.device) for chosen in (None, columns)
    )
    assert of_some < of_whole / 4  # they are a 35th of the parameters


def test_gram_matrices_of_parts_add_up(trained):
    run = trained(Classifier(weight_decay=0.05, decayed_bias=False))
    objective = run.objective()
    found = Root(objective)
    decayed = objective.penalty > 0
    assert 0 < int(decayed.sum()) < objective.size
    written_out = found.times(torch.eye(objective.size, dtype=torch.float64))
    close(found.gram(decayed), written_out[:, decayed] @ written_out[:, decayed].T)
    close(found.gram(decayed) + found.gram(~decayed), written_out @ written_out.T)


def test_factors_that_do_not_fit_the_memory_are_not_made(trained, monkeypatch):
    objective = trained(Classifier()).objective()
    monkeypatch.setattr(root, "_SHARE", 1e-6)
    found = Root(objective)
    assert found._kept[0] == []
    written_out = found.times(torch.eye(objective.size, dtype=torch.float64))
    close(found.gram(torch.ones(objective.size, dtype=torch.bool)), written_out @ written_out.T)
