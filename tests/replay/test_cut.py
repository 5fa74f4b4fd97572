"""At which tensors the weights of examples act: those nearest the loss that have one row for each example."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from lightning_dtda.errors import ReplayError
from lightning_dtda.replay.cut import Cuts, Rows
from tests.replay.steps import Step, Stepping, normal

B, F, C, T = 5, 3, 4, 7
"""Examples, features, outputs, positions."""


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def linear(inputs=F, outputs=C):
    return nn.Linear(inputs, outputs).double()


def rows(examples=B, features=F):
    """Items of features and a label."""
    return list(zip(normal(examples, features), torch.arange(examples) % C, strict=True))


def sequences(lengths):
    """Items of so many positions each, with a label at every position."""
    return [(normal(length, F, seed=n), (torch.arange(length) + n) % C) for n, length in enumerate(lengths)]


def padded(items):
    inputs, labels = zip(*items, strict=True)
    return pad_sequence(inputs, batch_first=True), pad_sequence(labels, batch_first=True, padding_value=-100)


def by_step(items):
    """As ``padded``, positions first."""
    return [part.transpose(0, 1) for part in padded(items)]


def squares(module, batch):
    return (module.net(batch[0]) - batch[1][:, None]) ** 2


def of_tokens(module, batch):
    logits = module.net(batch[0])
    return functional.cross_entropy(logits.flatten(0, 1), batch[1].flatten(), ignore_index=-100)


def contrastive(module, batch):
    embedded = module.net(batch[0])
    similarities = embedded @ embedded.T
    return functional.cross_entropy(similarities, torch.arange(len(similarities)))


def weighed_by_length(module, batch):
    present = batch[1] != -100
    errors = module.net(batch[0]).square().sum(-1) * present
    return errors.sum() / present.sum()


CASES = {
    "a mean": (lambda m, b: functional.cross_entropy(m.net(b[0]), b[1]), rows(), None, [((B, C), 0)]),
    "a mean of numbers": (lambda m, b: squares(m, b).mean(1).mean(), rows(), None, [((B,), 0)]),
    "a sum": (lambda m, b: squares(m, b).sum(), rows(), None, [((B, C), 0)]),
    "a mean over tokens": (of_tokens, sequences([3, 7, 5, 7, 2]), padded, [((B, T, C), 0)]),
    "a mean over tokens, positions first": (of_tokens, sequences([3, 7, 5, 7, 2]), by_step, [((T, B, C), 1)]),
    "a divisor that is the number of tokens": (
        weighed_by_length,
        sequences([3, 7, 5, 7, 2]),
        padded,
        [((B, T), 0)],
    ),
    "several terms": (
        lambda m, b: functional.cross_entropy(m.net(b[0]), b[1]) + 0.1 * m.net(b[0]).square().mean(),
        rows(),
        None,
        [((B, C), 0), ((B, C), 0)],
    ),
    "some of the examples": (lambda m, b: squares(m, b).mean(1).topk(2).values.mean(), rows(), None, [((B,), 0)]),
    "a choice by a mask": (lambda m, b: squares(m, b).mean(1)[b[1] > 0].mean(), rows(), None, [((B,), 0)]),
}


@pytest.mark.parametrize(("loss", "items", "collate", "expected"), CASES.values(), ids=CASES)
def test_the_first_tensor_with_a_row_for_each_example_ends_a_path(loss, items, collate, expected):
    step = Step(Stepping(loss, net=linear()), items, **({} if collate is None else {"collate": collate}))
    assert [(shape, found.axis) for shape, found in step.cut()] == expected


def test_a_matrix_of_all_pairs_is_no_row_of_any_so_that_the_way_goes_on_to_the_embeddings():
    step = Step(Stepping(contrastive, net=linear()), rows())
    assert sorted((shape, found.axis) for shape, found in step.cut()) == [((C, B), 1), ((B, C), 0)]


@pytest.mark.parametrize("positions", [B, B - 1, B + 1])
def test_another_axis_of_the_same_length_is_not_mistaken_for_that_over_examples(positions):
    items = list(zip(normal(B, positions, F), torch.arange(B), strict=True))
    step = Step(Stepping(lambda m, b: m.net(b[0]).square().mean((1, 2)).mean(), net=linear()), items)
    loss = Step(Stepping(lambda m, b: m.net(b[0]).square().mean(), net=linear()), items)
    assert step.cut() == [((B,), Rows(0))]
    assert loss.cut() == [((B, positions, C), Rows(0))]


@pytest.mark.parametrize("longest", range(B))
def test_padding_that_shrinks_with_the_example_left_out_does_not_mislead(longest):
    # without the longest example both axes are one shorter
    items = sequences([B if number == longest else B - 1 for number in range(B)])
    for collate, axis in ((padded, 0), (by_step, 1)):
        step = Step(Stepping(of_tokens, net=linear()), items, collate=collate)
        assert step.cut() == [((B, B, C), Rows(axis))]


def test_smaller_batches_have_the_graph_that_was_learned(monkeypatch):
    step = Step(Stepping(of_tokens, net=linear()), sequences([3, 7, 5, 7, 2]), collate=padded)
    step.cut()
    monkeypatch.setattr(Cuts, "learn", lambda *_: pytest.fail("a graph was learned again"))
    assert step.cut([0, 2, 4]) == [((3, 5, C), Rows(0))]
    assert step.cut([1]) == [((1, T, C), Rows(0))]


def test_a_batch_of_one_is_learned_from_the_example_repeated():
    step = Step(Stepping(lambda m, b: functional.cross_entropy(m.net(b[0]), b[1]), net=linear()), rows(1))
    assert step.cut() == [((1, C), Rows(0))]


@pytest.mark.parametrize("is_blocked", [True, False], ids=["one view after the other", "views side by side"])
def test_examples_may_have_several_rows(is_blocked):
    def of_views(module, batch):
        views = torch.cat([batch[0], -batch[0]]) if is_blocked else torch.stack([batch[0], -batch[0]], 1).flatten(0, 1)
        embedded = module.net(views)
        similarities = embedded @ embedded.T - 1e9 * torch.eye(len(embedded))
        other = torch.arange(len(embedded))
        partners = other.roll(len(other) // 2) if is_blocked else other ^ 1
        return functional.cross_entropy(similarities, partners)

    step = Step(Stepping(of_views, net=linear()), rows())
    assert {found._replace(axis=0) for _, found in step.cut()} == {Rows(0, 2, is_blocked)}

    # an example alone moves the gradient by both of its rows: the weights' sum is the whole, whatever their order
    parts = torch.stack([step.gradient(weights) for weights in torch.eye(B).double()])
    torch.testing.assert_close(parts.sum(0), step.gradient(), rtol=1e-12, atol=1e-14)
    embedded = step.replica.module.net(of := step.collate(step.items)[0])
    views = torch.stack([embedded, step.replica.module.net(-of)])  # (2, B, C)
    flat = (views.flatten(0, 1) if is_blocked else views.transpose(0, 1).flatten(0, 1)).detach().requires_grad_()
    similarities = flat @ flat.T - 1e9 * torch.eye(2 * B)
    other = torch.arange(2 * B)
    partners = other.roll(B) if is_blocked else other ^ 1
    (slope,) = torch.autograd.grad(functional.cross_entropy(similarities, partners), flat)
    slope = slope.unflatten(0, (2, B)) if is_blocked else slope.unflatten(0, (B, 2)).transpose(0, 1)
    for number in range(B):
        own = torch.autograd.grad(
            (views[:, number] * slope[:, number]).sum(), step.replica.parameters, retain_graph=True
        )
        torch.testing.assert_close(parts[number], step.layout.flatten(own), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("is_blocked", [True, False], ids=["one view after the other", "views side by side"])
def test_rows_may_be_numbers(is_blocked):
    def of_views(module, batch):
        views = torch.cat([batch[0], -batch[0]]) if is_blocked else torch.stack([batch[0], -batch[0]], 1).flatten(0, 1)
        return module.net(views).square().sum(1).mean()

    step = Step(Stepping(of_views, net=linear()), rows())
    assert step.cut() == [((2 * B,), Rows(0, 2, is_blocked))]


def test_a_penalty_past_all_rows_gets_its_gradient_unweighted():
    def penalised(module, batch):
        return squares(module, batch).mean() + 0.3 * sum((p**2).sum() for p in module.parameters())

    module = Stepping(penalised, net=linear())
    gradient = Step(module, rows()).gradient(torch.zeros(B).double())
    torch.testing.assert_close(gradient, torch.cat([0.6 * p.detach().flatten() for p in module.parameters()]))


class Balanced(Stepping):
    """Learns a weight between two losses, as in multi-task learning by uncertainty."""

    def __init__(self):
        super().__init__(None, net=linear())
        self.balance = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

    def training_step(self, batch, batch_idx):
        outputs = self.net(batch[0])
        first, second = functional.cross_entropy(outputs, batch[1]), outputs.square().mean()
        return first * self.balance.exp() + second * (-self.balance).exp()


def test_a_learned_weight_between_two_losses_is_refused_by_the_parameters_name():
    with pytest.raises(
        ReplayError, match=r"parameter balance cannot be divided among the examples of a batch.*Freeze the parameter"
    ):
        Step(Balanced(), rows()).cut()


def test_a_frozen_weight_between_two_losses_is_none_of_the_parameters():
    module = Balanced()
    module.balance.requires_grad_(False)
    assert len(Step(module, rows()).cut()) == 2


def test_another_way_through_the_module_is_another_graph():
    def branching(module, batch):
        outputs = module.net(batch[0])
        return outputs.square().mean() if batch[0][0, 0] > 0 else functional.cross_entropy(outputs.tanh(), batch[1])

    items = [(torch.full((F,), sign).double(), torch.tensor(1)) for sign in (1.0, 1.0, 1.0, -1.0, -1.0, -1.0)]
    step = Step(Stepping(branching, net=linear()), items)
    ways = [[0, 1, 2], [3, 4, 5]]
    for way in [*ways, *ways]:
        assert step.cut(way) == [((3, C), Rows(0))]
    assert len(step.eager.cuts._known) == 2


class Looping(Stepping):
    """Adds up its examples' losses one by one."""

    def __init__(self):
        super().__init__(None, net=linear())

    def training_step(self, batch, batch_idx):
        total = 0.0
        for example in batch[0]:
            total = total + self.net(example).square().mean()
        return total / len(batch[0])


def test_a_step_whose_graph_depends_on_the_size_of_the_batch_is_refused():
    with pytest.raises(ReplayError, match=r"Looping\.training_step runs different operations whenever the batch has"):
        Step(Looping(), rows()).cut()


def test_a_list_of_examples_losses_that_is_stacked_has_rows():
    def stacking(module, batch):
        return torch.stack([module.net(example).square().mean() for example in batch[0]]).mean()

    step = Step(Stepping(stacking, net=linear()), rows())
    whole = Step(Stepping(lambda m, b: m.net(b[0]).square().mean(), net=step.replica.module.net), rows())
    weights = normal(B)
    torch.testing.assert_close(step.gradient(weights), whole.gradient(weights), rtol=1e-12, atol=1e-14)


def test_a_loss_without_rows_for_examples_is_refused():
    step = Step(Stepping(lambda m, b: m.net(b[0].mean(0)).square().mean(), net=linear()), rows())
    with pytest.raises(
        ReplayError, match=r"No tensor on the way to the loss of Stepping.training_step has a row for each"
    ):
        step.cut()


def test_a_loss_of_no_parameter_is_refused():
    step = Step(Stepping(lambda m, b: b[0].sum(), net=linear()), rows())
    with pytest.raises(ReplayError, match="does not depend on the trained parameters"):
        step.cut()


def test_a_step_that_takes_one_size_only_is_refused_with_its_own_error():
    def particular(module, batch):
        assert len(batch[0]) == B, "batches of five, please"
        return module.net(batch[0]).square().mean()

    with pytest.raises(ReplayError, match=r"(?s)batches of five, please.*accept batches of any size"):
        Step(Stepping(particular, net=linear()), rows()).cut()
