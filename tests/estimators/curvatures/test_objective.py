"""Derivatives of the mean training loss, streamed, against the same written out."""

import copy

import pytest
import torch

from lightning_dtda.errors import AttributionError, ReplayError
from tests.estimators.curvatures.conftest import Classifier, Regressor

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
    products = objective.gauss_newton_products(objective.find_network(), v)
    torch.testing.assert_close(products, v @ run.gauss_newton(), rtol=1e-10, atol=1e-12)


def test_little_memory_means_few_examples_at_a_time(trained, vectors):
    run = trained(Regressor())
    whole, chunked = run.objective(), run.objective(memory=3e3)
    assert len(list(chunked.gradients())) > len(list(whole.gradients())) == 1
    v = vectors(whole.size, 1)
    torch.testing.assert_close(chunked.slopes(v), whole.slopes(v), rtol=1e-12, atol=1e-14)
    in_fives = run.objective(chunks={("Hessian products", 1): 5, ("Gauss-Newton products", 1): 5})
    torch.testing.assert_close(in_fives.hessian_products(v), v @ run.hessian(), rtol=1e-10, atol=1e-12)
    products = in_fives.gauss_newton_products(in_fives.find_network(), v)
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


def test_a_penalty_in_the_loss_is_no_part_of_a_gauss_newton_matrix(trained):
    class Penalised(Classifier):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + sum((p**2).sum() for p in self.parameters())

    with pytest.raises(AttributionError, match="otherwise than by the outputs of the network"):
        trained(Penalised()).objective().find_network()


def test_a_network_that_is_called_twice_is_none(trained):
    class Twice(Regressor):
        def training_step(self, batch, batch_idx):
            return torch.nn.functional.mse_loss(self.net(batch[0]) + self.net(-batch[0]), batch[1])

    with pytest.raises(ReplayError, match="has no network to be seen"):
        trained(Twice()).objective().find_network()


def test_a_loss_that_is_not_convex_has_no_root(trained):
    class Bent(Regressor):
        def training_step(self, batch, batch_idx):
            return (self(batch[0]) - batch[1]).cos().mean()

    objective = trained(Bent()).objective()
    with pytest.raises(AttributionError, match="not convex in the network's outputs"):
        list(objective.roots(objective.find_network()))


def test_examples_that_do_not_fit_the_memory_are_refused(trained):
    objective = trained(Regressor()).objective(memory=100)
    with pytest.raises(AttributionError, match="Raise memory_budget"):
        list(objective.gradients())
