"""Derivatives of the mean training loss, streamed, against the same written out."""

import copy

import pytest
import torch
from torch.func import functional_call

from lightning_dtda.errors import AttributionError
from lightning_dtda.estimators.example_gradients import Chunk
from lightning_dtda.estimators.layer_gradients import LayerGradients, OtherWayError
from lightning_dtda.replay import Draws
from tests.estimators.small_runs import Classifier, Regressor

MODULES = [Classifier, Regressor]


@pytest.mark.parametrize("module", MODULES)
def test_gradients_and_slopes_are_those_of_each_loss(trained, vectors, module):
    run = trained(module())
    objective, expected = run.objective(), torch.func.jacrev(run.losses)(run.theta)
    parts = list(objective.gradients())
    torch.testing.assert_close(torch.cat([part for _, part in parts]), expected, rtol=1e-10, atol=1e-12)
    v = vectors(objective.size)
    torch.testing.assert_close(objective.slopes(v), v @ expected.T, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("module", MODULES)
def test_products_are_those_of_the_matrices_written_out(trained, vectors, module):
    run = trained(module(weight_decay=0.1, decayed_bias=False))
    objective = run.objective()
    v = vectors(objective.size)
    torch.testing.assert_close(objective.hessian_products(v), v @ run.hessian(), rtol=1e-10, atol=1e-12)
    products = objective.gauss_newton_products(v)
    torch.testing.assert_close(products, v @ run.gauss_newton(), rtol=1e-10, atol=1e-12)


class Scales(torch.nn.Module):
    """A parameter of no layer, between two layers."""

    def __init__(self):
        super().__init__()
        self.first, self.scale, self.last = (
            torch.nn.Linear(4, 5),
            torch.nn.Parameter(torch.ones(5)),
            torch.nn.Linear(5, 3),
        )

    def forward(self, inputs):
        return self.last(torch.tanh(self.scale * self.first(inputs)))


@pytest.mark.parametrize("queries", [1, 4])
def test_parameters_of_no_layer_count_too(trained, vectors, queries):
    run = trained(Classifier(network=Scales))
    objective, expected = run.objective(), torch.func.jacrev(run.losses)(run.theta)
    v = vectors(objective.size, queries)
    torch.testing.assert_close(objective.slopes(v), v @ expected.T, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(next(objective.gradients())[1], expected, rtol=1e-10, atol=1e-12)


def test_slopes_of_some_examples_leave_the_others_at_zero(trained, vectors):
    objective, some = trained(Classifier()).objective(), torch.tensor([1, 4, 9])
    v = vectors(objective.size)
    found, whole = objective.slopes(v, some), objective.slopes(v)
    torch.testing.assert_close(found[:, some], whole[:, some], rtol=1e-12, atol=1e-14)
    found[:, some] = 0
    assert not found.any()


def test_where_a_batch_goes_another_way_slopes_and_gradients_are_the_same(trained, vectors, monkeypatch):
    run = trained(Classifier())
    expected, v = torch.func.jacrev(run.losses)(run.theta), vectors(len(run.theta))

    def other_way(*_):
        raise OtherWayError

    monkeypatch.setattr(LayerGradients, "products", other_way)
    torch.testing.assert_close(run.objective().slopes(v), v @ expected.T, rtol=1e-10, atol=1e-12)
    objective = run.objective()
    assert objective._layers is not None
    monkeypatch.setattr(LayerGradients, "add_gradients", other_way)
    torch.testing.assert_close(next(objective.gradients())[1], expected, rtol=1e-10, atol=1e-12)
    assert objective._layers is None


@pytest.mark.parametrize("module", MODULES)
def test_passes_of_single_examples_are_traced_where_they_can_be(trained, module):
    kept = {}
    list(trained(module()).objective(kept=kept).roots())
    assert len(kept) == 2  # of the losses' Hessians, and of the root
    assert all(trace is not None for trace in kept.values())


def test_little_memory_means_few_examples_at_a_time(trained, vectors):
    run = trained(Regressor())
    whole, chunked = run.objective(), run.objective(memory=7e3)
    assert len(list(chunked.gradients())) > len(list(whole.gradients())) == 1
    v = vectors(whole.size, 1)
    torch.testing.assert_close(chunked.slopes(v), whole.slopes(v), rtol=1e-12, atol=1e-14)
    in_fives = run.objective(chunks={"Hessian products": Chunk(5, 1), "Gauss-Newton products": Chunk(5, 1)})
    torch.testing.assert_close(in_fives.hessian_products(v), v @ run.hessian(), rtol=1e-10, atol=1e-12)
    products = in_fives.gauss_newton_products(v)
    torch.testing.assert_close(products, v @ run.gauss_newton(), rtol=1e-10, atol=1e-12)


def test_an_intermediate_step_has_the_parameters_of_that_step(trained):
    module = Regressor()
    stopped, run = trained(copy.deepcopy(module), steps=5, root="stopped"), trained(module)
    torch.testing.assert_close(run.objective(step=5).theta, stopped.theta, rtol=1e-14, atol=1e-16)


def test_decoupled_weight_decay_is_no_part_of_the_objective(trained):
    class Decoupled(Classifier):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.3)

    assert not trained(Decoupled()).objective().penalty.any()


class Penalised(Classifier):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + sum((p**2).sum() for p in self.parameters())


def test_a_penalty_in_the_loss_is_part_of_the_matrices_and_of_no_root(trained, vectors):
    run = trained(Penalised())
    objective, v = run.objective(), vectors(len(run.theta))
    torch.testing.assert_close(
        objective.gauss_newton_products(v), v @ run.gauss_newton() + 2 * v, rtol=1e-10, atol=1e-12
    )
    torch.testing.assert_close(objective.hessian_products(v), v @ run.hessian() + 2 * v, rtol=1e-10, atol=1e-12)
    assert not objective.has_root
    for ask in (lambda: objective.outputs, lambda: list(objective.roots())):
        with pytest.raises(AttributionError, match="needs a loss that is a mean over single examples"):
            ask()


def test_a_penalty_in_the_loss_is_no_part_of_an_examples_gradient(trained, vectors):
    run = trained(Penalised())
    objective, v = run.objective(), vectors(len(run.theta))
    expected = torch.func.jacrev(run.losses)(run.theta)
    torch.testing.assert_close(objective.slopes(v), v @ expected.T, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(next(objective.gradients())[1], expected, rtol=1e-10, atol=1e-12)


class Weighted(Classifier):
    """Divides by the class weights in the batch, so that an example's share depends on the others."""

    def training_step(self, batch, batch_idx):
        weight = torch.tensor([1.0, 4.0, 0.5], dtype=torch.float64)
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1], weight=weight)


class Summed(Classifier):
    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1], reduction="sum")


def in_sevens(run):
    """Examples in batches as large as those of the training, the same ones each time."""
    return torch.randperm(len(run.data), generator=torch.Generator().manual_seed(0)).split(7)


@pytest.mark.parametrize("module", [Weighted, Summed])
def test_losses_that_are_no_means_are_those_of_batches_as_large_as_in_training(trained, vectors, module):
    run = trained(module())
    objective, v, batches = run.objective(), vectors(len(run.theta)), in_sevens(run)
    assert not objective.has_root

    def loss(theta, weights):
        losses = run.losses(theta) * weights
        if module is Summed:
            return losses.sum() * 7 / len(run.data)
        of_classes = torch.tensor([1.0, 4.0, 0.5], dtype=torch.float64)[run.data.tensors[1]]
        parts = [(of_classes * losses)[some].sum() / of_classes[some].sum() for some in batches]
        return sum(parts) * 7 / len(run.data)

    ones = torch.ones(len(run.data), dtype=torch.float64)
    hessian = torch.func.hessian(loss)(run.theta, ones)
    torch.testing.assert_close(objective.hessian_products(v), v @ hessian, rtol=1e-10, atol=1e-12)
    shares = torch.func.jacrev(lambda weights: torch.func.grad(loss)(run.theta, weights))(ones).T * len(run.data)
    torch.testing.assert_close(objective.slopes(v), v @ shares.T, rtol=1e-10, atol=1e-12)
    gradients = torch.empty_like(shares)
    for indices, rows in objective.gradients():
        gradients[indices] = rows
    torch.testing.assert_close(gradients, shares, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        objective.fisher_products(v), v @ shares.T @ shares / len(run.data), rtol=1e-10, atol=1e-12
    )


class Noisy(Regressor):
    def training_step(self, batch, batch_idx):
        noise = 0.3 * torch.randn_like(batch[0])
        return torch.nn.functional.mse_loss(self(batch[0] + noise), batch[1])


def test_a_loss_that_draws_random_numbers_is_the_mean_over_draws(trained, vectors):
    run = trained(Noisy())
    draws, (inputs, targets) = Draws(3, seed=5), run.data.tensors
    objective, v = run.objective(draws=draws), vectors(len(run.theta))

    def loss(theta):
        total = 0.0
        for seed in draws.of(-1):
            for some in in_sevens(run):
                torch.manual_seed(seed)
                moved = inputs[some] + 0.3 * torch.randn_like(inputs[some])
                outputs = functional_call(run.module, run.replay.layout.unflatten(theta), (moved,))
                total = total + torch.nn.functional.mse_loss(outputs, targets[some])
        return total * 7 / len(inputs) / draws.number

    hessian = torch.autograd.functional.hessian(loss, run.theta)
    torch.testing.assert_close(objective.hessian_products(v), v @ hessian, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        objective.slopes(v).mean(1), v @ torch.autograd.functional.jacobian(loss, run.theta), rtol=1e-10, atol=1e-12
    )
    assert not objective.has_root


def test_a_network_that_is_called_twice_has_the_outputs_of_both_calls(trained, vectors):
    class Twice(Regressor):
        def training_step(self, batch, batch_idx):
            return torch.nn.functional.mse_loss(self.net(batch[0]) + self.net(-batch[0]), batch[1])

    run = trained(Twice())
    objective, (inputs, targets) = run.objective(), run.data.tensors

    def residuals(theta):
        parameters = run.replay.layout.unflatten(theta)
        one, other = (functional_call(run.module, parameters, (x,)) for x in (inputs, -inputs))
        return (one + other - targets).flatten()

    # of a mean of squares: 2 / n times J^T J
    jacobian = torch.func.jacrev(residuals)(run.theta)
    expected = 2 / len(jacobian) * jacobian.T @ jacobian
    v = vectors(objective.size)
    assert objective.outputs == 4
    torch.testing.assert_close(objective.gauss_newton_products(v), v @ expected, rtol=1e-10, atol=1e-12)
    root = torch.cat([rows.rows for rows in objective.roots()])
    torch.testing.assert_close(root.T @ root / objective.examples, expected, rtol=1e-10, atol=1e-12)


def test_a_loss_that_is_not_convex_has_no_root(trained):
    class Bent(Regressor):
        def training_step(self, batch, batch_idx):
            return (self(batch[0]) - batch[1]).cos().mean()

    objective = trained(Bent()).objective()
    with pytest.raises(AttributionError, match="not convex in the network's outputs"):
        list(objective.roots())


def test_examples_that_do_not_fit_the_memory_are_refused(trained):
    objective = trained(Regressor()).objective(memory=100)
    with pytest.raises(AttributionError, match="Raise memory_budget"):
        list(objective.gradients())


class Annealed(Regressor):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * (1 + self.global_step)


def test_what_is_kept_from_one_step_to_the_next_is_that_of_its_step(trained):
    run, kept = trained(Annealed()), {}
    for step in (4, 8, None):
        (_, found), *_ = run.objective(step=step, kept=kept).gradients()
        (_, expected), *_ = run.objective(step=step).gradients()
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
