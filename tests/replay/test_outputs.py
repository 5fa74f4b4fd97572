"""The loss as a function of the network's outputs: both parts of the Gauss-Newton matrix, against torch.func."""

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional

from tests.replay.steps import Step, Stepping, normal

B, F, C, T = 5, 3, 4, 2


def cross_entropy(outputs, labels):
    return functional.cross_entropy(outputs, labels)


def squares(outputs, labels):
    return functional.mse_loss(outputs[:, 0], labels.double())


def of_positions(outputs, labels):
    return functional.cross_entropy(outputs.flatten(0, 1), labels[:, None].expand(-1, T).flatten())


def smoothed(outputs, labels):
    return functional.cross_entropy(outputs, labels, label_smoothing=0.1) + 0.1 * outputs.square().mean()


class Positions(nn.Module):
    """Outputs at each of two positions."""

    def __init__(self, bias=True):
        super().__init__()
        self.first, self.last = nn.Linear(F, 4), nn.Linear(4, C, bias=bias)

    def forward(self, inputs):
        return self.last(torch.tanh(self.first(torch.stack([inputs, -inputs], 1))))


class TwoHeads(nn.Module):
    """Outputs of two layers, of which the second gets what the first makes."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(F, 2), nn.Linear(2, C)

    def forward(self, inputs):
        hidden = self.first(inputs)
        return hidden, self.last(hidden)


def of_both(outputs, labels):
    hidden, last = outputs
    return functional.cross_entropy(last, labels) + hidden.square().mean()


def mlp():
    return nn.Sequential(nn.Linear(F, 4), nn.Tanh(), nn.Linear(4, C))


def convolutions():
    return nn.Sequential(nn.Unflatten(1, (1, F)), nn.Conv1d(1, C, 2), nn.Tanh(), nn.Conv1d(C, C, 2), nn.Flatten())


# the network, the loss of its outputs, and the outputs' shapes
CASES = {
    "logits": (mlp, cross_entropy, [(B, C)]),
    "squared errors of a part of the outputs": (mlp, squares, [(B, C)]),
    "label smoothing and a term of the outputs": (mlp, smoothed, [(B, C)]),
    "positions": (Positions, of_positions, [(B, T, C)]),
    "positions without a bias": (lambda: Positions(bias=False), of_positions, [(B, T, C)]),
    "convolutions": (convolutions, cross_entropy, [(B, C, 1)]),
    "two heads, one behind the other": (TwoHeads, of_both, [(B, 2), (B, C)]),
}


class Case:
    """A step, and its network and loss as plain functions of flat parameters and flat outputs."""

    def __init__(self, make, loss, shapes):
        torch.manual_seed(0)
        self.net, self._loss, self.shapes = make().double(), loss, shapes
        items = list(zip(normal(B, F), torch.arange(B) % C, strict=True))
        self.step = Step(Stepping(lambda module, batch: loss(module.net(batch[0]), batch[1]), net=self.net), items)
        self.inputs, self.labels = self.step.collate(items)
        self.theta = self.step.theta
        self.v = normal(len(self.theta), seed=5)

    def network(self, theta):
        """The outputs, flat."""
        parameters = self.step.layout.unflatten(theta)
        named = {name.removeprefix("net."): value for name, value in parameters.items()}
        outputs = functional_call(self.net, named, (self.inputs,))
        return torch.cat([part.flatten() for part in (outputs if isinstance(outputs, tuple) else [outputs])])

    def loss(self, flat):
        """The loss of flat outputs."""
        sizes = [torch.Size(shape).numel() for shape in self.shapes]
        parts = [part.reshape(shape) for part, shape in zip(flat.split(sizes), self.shapes, strict=True)]
        if self.shapes[0] == (B, C, 1):
            parts = [parts[0].flatten(1)]
        return self._loss(tuple(parts) if len(parts) > 1 else parts[0], self.labels)


@pytest.fixture(params=CASES)
def case(request):
    return Case(*CASES[request.param])


def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def close(found, expected, tolerance=1e-11):
    torch.testing.assert_close(found, expected, rtol=0, atol=float(tolerance * expected.abs().max()))


def test_outputs_are_where_the_last_parameters_act(case):
    with case.step.passed() as one:
        assert one.outputs.shapes == case.shapes


def test_the_gradient_by_the_outputs_is_that_of_the_loss(case):
    with case.step.passed() as one:
        close(flat(one.outputs.gradient()), torch.func.grad(case.loss)(case.network(case.theta)))


def test_the_jacobians_products_are_those_of_the_network(case):
    jacobian = torch.func.jacrev(case.network)(case.theta)
    with case.step.passed() as one:
        outputs = one.outputs
        close(flat(outputs.push(case.step.split(case.v))), jacobian @ case.v)
        u = normal(len(jacobian), seed=6)
        close(case.step.layout.flatten(outputs.pull(outputs.split(u))), u @ jacobian)


def test_the_curvature_is_that_of_the_loss_by_its_outputs(case):
    hessian = torch.func.hessian(case.loss)(case.network(case.theta))
    with case.step.passed() as one:
        outputs = one.outputs
        u = normal(len(hessian), seed=6)
        close(flat(outputs.curve(outputs.split(u))), hessian @ u)
        close(outputs.hessian(), hessian)


def test_their_product_is_the_gauss_newton_matrix(case):
    jacobian = torch.func.jacrev(case.network)(case.theta)
    hessian = torch.func.hessian(case.loss)(case.network(case.theta))
    with case.step.passed() as one:
        outputs = one.outputs
        found = outputs.pull(outputs.curve(outputs.push(case.step.split(case.v))))
        close(case.step.layout.flatten(found), jacobian.T @ (hessian @ (jacobian @ case.v)))


def test_together_with_the_networks_own_curvature_it_is_the_hessian(case):
    whole = torch.func.hessian(lambda theta: case.loss(case.network(theta)))(case.theta)
    close(case.step.products(case.v)[0], whole @ case.v)


def test_a_loss_that_is_linear_in_the_outputs_has_no_curvature():
    step = Step(
        Stepping(lambda m, b: m.net(b[0]).sum(1).mean(), net=mlp().double()), [(row, 0) for row in normal(B, F)]
    )
    with step.passed() as one:
        assert not one.outputs.hessian().any()
        ones = one.outputs.split(torch.ones(B * C).double())
        assert not flat(one.outputs.curve(ones)).any()


def test_parameters_of_another_layer_in_the_loss_are_outputs_too():
    """A loss with parameters of its own: what they make is the output, not what they get."""
    scaled = Stepping(lambda m, b: functional.cross_entropy(m.net(b[0]) * m.scale, b[1]), net=mlp().double())
    scaled.scale = nn.Parameter(torch.full((C,), 2.0, dtype=torch.float64))
    step = Step(scaled, list(zip(normal(B, F), torch.arange(B) % C, strict=True)))
    with step.passed() as one:
        assert one.outputs.shapes == [(B, C)]
        jacobian_of_scale = one.outputs.pull(
            one.outputs.gradient(), [step.replica.parameters[step.names.index("scale")]]
        )
        whole = step.layout.unflatten(step.gradient())["scale"]
        close(jacobian_of_scale[0], whole)
