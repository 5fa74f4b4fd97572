"""Derivatives of a pass by parameters and by the weights of examples, against losses with explicit weights."""

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from lightning_dtda.replay import passes
from lightning_dtda.replay.cut import nodes_behind
from lightning_dtda.replay.steps import StepBatch
from tests.replay.steps import Step, Stepping, normal

B, F, C = 6, 3, 4
EXACT = 1e-12  # relative; the same sums in another order, in double precision
CLASS_WEIGHTS = torch.tensor([1.0, 3.0, 0.5, 2.0], dtype=torch.float64)


def padded(items):
    inputs, labels = zip(*items, strict=True)
    return pad_sequence(inputs, batch_first=True), pad_sequence(labels, batch_first=True, padding_value=-100)


TABLE = list(zip(normal(B, F), torch.arange(B) % C, strict=True))
TEXT = [(normal(length, F, seed=length), torch.arange(length) % C) for length in (3, 7, 5, 2, 7, 4)]


def mean(net, inputs, labels):
    return functional.cross_entropy(net(inputs), labels)


def weighted_mean(net, inputs, labels, w):
    return (w * functional.cross_entropy(net(inputs), labels, reduction="none")).sum() / len(w)


def total(net, inputs, labels):
    return (net(inputs).sin() ** 2).sum()


def weighted_total(net, inputs, labels, w):
    return (w[:, None] * net(inputs).sin() ** 2).sum()


def class_weights(net, inputs, labels):
    return functional.cross_entropy(net(inputs), labels, weight=CLASS_WEIGHTS)


def weighted_class_weights(net, inputs, labels, w):
    # the divisor is that of all examples, whatever their weights
    losses = functional.cross_entropy(net(inputs), labels, reduction="none")
    return (w * CLASS_WEIGHTS[labels] * losses).sum() / CLASS_WEIGHTS[labels].sum()


def tokens(net, inputs, labels):
    return functional.cross_entropy(net(inputs).transpose(1, 2), labels, ignore_index=-100)


def weighted_tokens(net, inputs, labels, w):
    losses = functional.cross_entropy(net(inputs).transpose(1, 2), labels, ignore_index=-100, reduction="none")
    return (w[:, None] * losses).sum() / (labels != -100).sum()


def smoothed(net, inputs, labels):
    return functional.cross_entropy(net(inputs), labels, label_smoothing=0.2)


def weighted_smoothed(net, inputs, labels, w):
    log_probabilities = net(inputs).log_softmax(1)
    own = log_probabilities.gather(1, labels[:, None])[:, 0]
    return -(w * (0.8 * own + 0.2 * log_probabilities.mean(1))).mean()


def several(net, inputs, labels):
    outputs = net(inputs)
    penalty = sum((p**2).sum() for p in net.parameters())
    return functional.cross_entropy(outputs, labels) + 0.2 * (outputs**2).mean() + 0.01 * penalty


def weighted_several(net, inputs, labels, w):
    outputs = net(inputs)
    penalty = sum((p**2).sum() for p in net.parameters())
    losses = functional.cross_entropy(outputs, labels, reduction="none") + 0.2 * (outputs**2).mean(1)
    return (w * losses).mean() + 0.01 * penalty


def chosen(net, inputs, labels):
    return functional.cross_entropy(net(inputs), labels, reduction="none").topk(3).values.mean()


def weighted_chosen(net, inputs, labels, w):
    losses = functional.cross_entropy(net(inputs), labels, reduction="none")
    hardest = losses.detach().topk(3).indices
    return (w * losses)[hardest].mean()


def of_outputs_and_what_is_made_of_them(net, inputs, labels):
    outputs = net(inputs)
    return functional.mse_loss(outputs, functional.one_hot(labels, C).double()) + 0.3 * (outputs**2).mean()


def weighted_outputs_and_what_is_made_of_them(net, inputs, labels, w):
    outputs = net(inputs)
    return (w[:, None] * ((outputs - functional.one_hot(labels, C)) ** 2 + 0.3 * outputs**2)).mean()


CASES = {
    "a mean": (mean, weighted_mean, TABLE, None),
    "a sum": (total, weighted_total, TABLE, None),
    "class weights": (class_weights, weighted_class_weights, TABLE, None),
    "a mean over tokens": (tokens, weighted_tokens, TEXT, padded),
    "label smoothing": (smoothed, weighted_smoothed, TABLE, None),
    "several terms and a penalty": (several, weighted_several, TABLE, None),
    "a term of outputs, and one of what is made of them": (
        of_outputs_and_what_is_made_of_them,
        weighted_outputs_and_what_is_made_of_them,
        TABLE,
        None,
    ),
    "the hardest examples": (chosen, weighted_chosen, TABLE, None),
}


class Case:
    """A step, and its loss with explicit weights as a plain function of parameters and weights."""

    def __init__(self, loss, weighted, items, collate):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(F, 5), nn.Tanh(), nn.Linear(5, C)).double()
        arguments = {} if collate is None else {"collate": collate}
        self.step = Step(Stepping(lambda module, batch: loss(module.net, *batch), net=net), items, **arguments)
        self.theta, self._net, self._weighted = self.step.theta, net, weighted
        self.v = normal(len(self.theta), seed=5)
        self.w = normal(B, seed=6)

    def loss(self, theta, w):
        parameters = self.step.layout.unflatten(theta)

        def net(inputs):
            named = {name.removeprefix("net."): value for name, value in parameters.items()}
            return functional_call(self._net, named, (inputs,))

        net.parameters = parameters.values
        return self._weighted(net, *self.step.collate(self.step.items), w)


@pytest.fixture(params=CASES, ids=list(CASES))
def case(request):
    return Case(*CASES[request.param])


def close(found, expected, tolerance=EXACT):
    torch.testing.assert_close(found, expected, rtol=0, atol=float(tolerance * expected.abs().max()))


def test_the_gradient_is_that_of_the_loss_with_explicit_weights(case):
    ones = torch.ones(B).double()
    for w in (ones, case.w, ones - torch.eye(B)[2]):
        close(case.step.gradient(w), torch.func.grad(case.loss)(case.theta, w))


def test_an_examples_term_is_how_its_weight_changes_the_slope(case):
    def slope(w):
        return torch.func.grad(case.loss)(case.theta, w) @ case.v

    expected = torch.func.grad(slope)(torch.ones(B).double())
    close(case.step.products(case.v)[1], expected)
    with case.step.passed() as one:
        close(one.terms(case.step.split(case.v)), expected)


def test_an_examples_share_is_what_its_weight_adds_to_the_gradient(case):
    shares = torch.func.jacrev(lambda w: torch.func.grad(case.loss)(case.theta, w))(torch.ones(B).double())
    with case.step.passed() as one:
        found = torch.stack([case.step.layout.flatten(one.share_of(n)) for n in range(B)], 1)
    # of all of them, the share has what is no example's own, a penalty
    penalty = torch.func.grad(case.loss)(case.theta, torch.zeros(B).double())
    close(found - penalty[:, None], shares, 1e-11)


def test_the_hessians_product_is_a_finite_difference_of_the_gradient(case):
    h = 1e-5
    ahead, behind = (case.step.gradient(theta=case.theta + sign * h * case.v) for sign in (1, -1))
    close(case.step.products(case.v)[0], (ahead - behind) / (2 * h), 1e-8)  # of second order in h: reached 1e-9


def test_the_hessian_is_symmetric(case):
    u = normal(len(case.theta), seed=9)
    one, other = case.step.products(case.v)[0] @ u, case.step.products(u)[0] @ case.v
    torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-13)


def test_a_pass_may_be_asked_again(case):
    with case.step.passed() as one:
        answers = [one.products(case.step.split(case.v)) for _ in range(2)]
    for first, second in zip(answers[0][0], answers[1][0], strict=True):
        assert torch.equal(first, second)


PIECEWISE_LINEAR = {
    "Threshold": nn.ReLU(),
    "LeakyRelu": nn.LeakyReLU(),
    "Hardtanh": nn.ReLU6(),
    "Hardshrink": nn.Hardshrink(),
    "Softshrink": nn.Softshrink(),
    "MaxPool2DWithIndices": nn.MaxPool2d(2),
    "MaxPool3DWithIndices": nn.MaxPool3d((1, 2, 2)),
    "AdaptiveMaxPool2D": nn.AdaptiveMaxPool2d(2),
    "AdaptiveMaxPool3D": nn.AdaptiveMaxPool3d(2),
    "AvgPool2D": nn.AvgPool2d(2),
    "AvgPool3D": nn.AvgPool3d((1, 2, 2)),
    "AdaptiveAvgPool2D": nn.AdaptiveAvgPool2d(2),
    "AdaptiveAvgPool3D": nn.AdaptiveAvgPool3d(2),
}


@pytest.mark.parametrize("name", PIECEWISE_LINEAR)
def test_values_of_piecewise_linear_layers_get_no_zeros_and_derivatives_are_the_same(name, monkeypatch):
    monkeypatch.setattr(passes, "_LARGE", 1)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), PIECEWISE_LINEAR[name], nn.Flatten(), nn.LazyLinear(3)).double()
    images = normal(B, 1, 4, 4)
    net(images)
    step = Step(Stepping(lambda module, batch: module.net(batch).sin().square().sum(), net=net), images)
    v, arrived = normal(len(step.theta), seed=5), []
    with step.passed() as one:
        for node in nodes_behind(one.gradient):
            if node.name() == f"{name}BackwardBackward0":
                node.register_hook(lambda found, _: arrived.append(found[1]))
        curved, _, _ = one.products(step.split(v))
    assert arrived == [None]

    def loss(theta):
        parameters = {key.removeprefix("net."): part for key, part in step.layout.unflatten(theta).items()}
        return functional_call(net, parameters, (images,)).sin().square().sum()

    close(step.layout.flatten(curved), torch.func.hessian(loss)(step.theta) @ v)


def test_a_parameter_that_the_loss_does_not_use_gets_zeros():
    module = Stepping(
        lambda m, b: m.net(b[0]).square().mean(), net=nn.Linear(F, 2).double(), other=nn.Linear(2, 2).double()
    )
    step = Step(module, TABLE)
    curved, terms, _ = step.products(torch.ones_like(step.theta))
    others = torch.cat(
        [
            torch.full((size,), name.startswith("other"))
            for name, size in zip(step.names, step.layout.sizes, strict=True)
        ]
    )
    assert not curved[others].any()
    assert not step.gradient()[others].any()
    assert curved[~others].any()
    assert terms.any()


def test_a_loss_that_is_linear_in_the_parameters_has_no_second_derivative():
    step = Step(Stepping(lambda m, b: m.net(b[0]).mean(), net=nn.Linear(F, 1).double()), TABLE)
    curved, terms, _ = step.products(torch.ones_like(step.theta))
    assert not curved.any()
    inputs = torch.stack([item[0] for item in TABLE])
    close(terms, (inputs.sum(1) + 1) / B)


def test_a_step_of_several_micro_batches_is_their_mean():
    step = Case(*CASES["class weights"]).step
    parts = [[0, 1, 2, 3], [4, 5]]
    passes = [step.inputs(part, factor=0.5) for part in parts]
    batch = StepBatch.of([torch.arange(B)], [passes], torch.device("cpu"))
    w, v = normal(B, seed=6), normal(len(step.theta), seed=5)
    gradient, _ = step.eager.gradient(batch, step.theta[None], {}, w[None])
    close(gradient[0], sum(step.gradient(w[part], part) for part in parts) / 2)
    found = step.eager.products(batch, step.theta[None], {}, v[None, None], {})
    ones = torch.ones(1, B).double()
    without = [step.eager.gradient(batch, step.theta[None], {}, ones - row)[0][0] for row in torch.eye(B).double()]
    close(found.terms[0, 0], torch.stack([(found.gradient[0] - one) @ v for one in without]), 1e-11)
    h = 1e-5
    ahead, behind = (step.eager.gradient(batch, (step.theta + sign * h * v)[None], {})[0][0] for sign in (1, -1))
    close(found.products[0, 0], (ahead - behind) / (2 * h), 1e-8)
    assert found.terms.shape == (1, 1, B)
