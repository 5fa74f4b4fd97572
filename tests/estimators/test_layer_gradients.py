"""Gradients of single examples by layers, against each example's loss differentiated on its own."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from lightning_dtda.estimators.layer_gradients import LayerGradients, OtherWayError
from lightning_dtda.trajectory import ParameterLayout

B, QUERIES = 3, 4


class Tokens(nn.Module):
    """Tokens of an example, and positions that are the same for all of them."""

    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(7, 6, padding_idx=0), nn.Embedding(5, 6)
        self.head = nn.Linear(6, 7, bias=False)

    def forward(self, tokens):
        return self.head(torch.tanh(self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))))


class OneRow(Tokens):
    """Positions with an axis of length one, as transformers has them."""

    def forward(self, tokens):
        return self.head(torch.tanh(self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1])[None])))


class Tied(Tokens):
    def __init__(self):
        super().__init__()
        self.head.weight = self.tokens.weight


class Decoder(Tokens):
    """A weight that is used past its layer as well."""

    def forward(self, tokens):
        return torch.tanh(self.tokens(tokens) + self.positions(torch.arange(5))) @ self.tokens.weight.T


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, inputs):
        return self.layer(torch.tanh(self.layer(inputs)))


class Scaled(nn.Module):
    """A parameter of no layer."""

    def __init__(self):
        super().__init__()
        self.layer, self.scale = nn.Linear(4, 3), nn.Parameter(torch.ones(3))

    def forward(self, inputs):
        return self.layer(inputs) * self.scale


def batch_norm():
    norm = nn.BatchNorm2d(4)
    norm.running_mean.copy_(torch.randn(4))
    norm.running_var.copy_(torch.rand(4) + 0.5)
    return nn.Sequential(nn.Conv2d(2, 4, 3), norm, nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(4 * 16, 3))


def tokens():
    return torch.randint(7, (B, 5))


CASES = {
    "linear": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), lambda: torch.randn(B, 4)),
    "positions": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)),
        lambda: torch.randn(B, 6, 4),
    ),
    "norm of two axes": (lambda: nn.Sequential(nn.LayerNorm((6, 4)), nn.Linear(4, 2)), lambda: torch.randn(B, 6, 4)),
    "conv1d": (
        lambda: nn.Sequential(nn.Conv1d(4, 6, 3, stride=2, padding=2, groups=2), nn.GroupNorm(3, 6)),
        lambda: torch.randn(B, 4, 9),
    ),
    "conv2d": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, (3, 2), dilation=(1, 2), padding="same", padding_mode="circular"),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, 4, 3, stride=(2, 1), groups=4, bias=False),
        ),
        lambda: torch.randn(B, 2, 7, 6),
    ),
    "conv3d": (
        lambda: nn.Conv3d(2, 3, (2, 3, 1), padding=(1, 0, 0), stride=(1, 2, 1)),
        lambda: torch.randn(B, 2, 3, 5, 2),
    ),
    "batch norm": (batch_norm, lambda: torch.randn(B, 2, 6, 6)),
    "tokens": (Tokens, tokens),
    "one row": (OneRow, tokens),
    "tied": (Tied, tokens),
    "called twice": (Twice, lambda: torch.randn(B, 4)),
}


def case(make, data):
    torch.manual_seed(0)
    module = make().double().eval()
    inputs = data()
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    parameters = dict(module.named_parameters())
    layout = ParameterLayout(
        tuple(parameters), tuple(tuple(one.shape) for one in parameters.values()), (len(parameters),)
    )

    def loss(outputs):
        return outputs.flatten(1).sin().square().sum(1).mean()

    def alone(number):
        losses = loss(functional_call(module, parameters, inputs[number : number + 1]))
        found = torch.autograd.grad(losses, list(parameters.values()), allow_unused=True, materialize_grads=True)
        return layout.flatten(list(found)) / B

    return module, layout, inputs, loss, torch.stack([alone(number) for number in range(B)])


def learned(module, layout, inputs, loss, gradients):
    known = LayerGradients(module, layout)
    with known.watched(B) as calls:
        known.learn(loss(module(inputs)), calls, gradients[:2])
    return known


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("queries", [1, QUERIES])
def test_gradients_and_products_are_those_of_each_example(name, queries):
    module, layout, inputs, loss, gradients = case(*CASES[name])
    known = learned(module, layout, inputs, loss, gradients)
    assert known.others == []
    vectors = torch.randn(queries, layout.size, dtype=torch.float64)
    with known.watched(B) as calls:
        found = known.products(loss(module(inputs)), calls, vectors)
    torch.testing.assert_close(found, vectors @ gradients.T, rtol=1e-10, atol=1e-12)
    rows, total = torch.tensor([2, 0]), torch.ones(2, layout.size, dtype=torch.float64)
    with known.watched(B) as calls:
        known.add_gradients(loss(module(inputs)), calls, total, rows, factor=-2.0)
    torch.testing.assert_close(total, 1 - 2 * gradients[rows], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("make", "data", "number"), [(Decoder, tokens, 0), (Scaled, CASES["linear"][1], 0)])
def test_what_is_no_layers_alone_is_not_known(make, data, number):
    module, layout, inputs, loss, gradients = case(make, data)
    known = learned(module, layout, inputs, loss, gradients)
    assert known.others == [number]
    assert layout.names[number] in ("tokens.weight", "scale")
    vectors = torch.randn(2, layout.size, dtype=torch.float64)
    with known.watched(B) as calls:
        found = known.products(loss(module(inputs)), calls, vectors)
    rest = layout.unflatten(torch.zeros(layout.size, dtype=torch.float64))
    rest[layout.names[number]].fill_(1)
    others = layout.flatten(list(rest.values())).bool()
    vectors[:, others] = 0
    torch.testing.assert_close(found, vectors @ gradients.T, rtol=1e-10, atol=1e-12)


def test_a_batch_as_large_as_its_sequences_are_long_has_positions_of_its_own():
    module, layout, inputs, loss, gradients = case(*CASES["tokens"])
    known = learned(module, layout, inputs, loss, gradients)
    inputs = torch.randint(7, (5, 5))
    vectors = torch.randn(2, layout.size, dtype=torch.float64)
    with known.watched(5) as calls:
        found = known.products(loss(module(inputs)), calls, vectors)
    with known.watched(3) as calls:
        few = known.products(loss(module(inputs[:3])), calls, vectors)
    torch.testing.assert_close(found[:, :3] * 5, few * 3, rtol=1e-10, atol=1e-12)


def test_examples_along_another_axis_are_not_known():
    def make():
        return nn.Sequential(nn.Linear(4, 3))

    module, layout, inputs, loss, gradients = case(make, lambda: torch.randn(B, 5, 4))
    known = LayerGradients(module, layout)
    with known.watched(B) as calls:
        known.learn(loss(module(inputs.transpose(0, 1)).transpose(0, 1)), calls, gradients[:2])
    assert known.is_empty


def test_another_way_through_the_layers_is_noticed():
    module, layout, inputs, loss, gradients = case(*CASES["called twice"])
    known = learned(module, layout, inputs, loss, gradients)
    with known.watched(B) as calls:
        value = loss(module.layer(inputs))
    with pytest.raises(OtherWayError):
        known.products(value, calls, torch.zeros(1, layout.size, dtype=torch.float64))
