"""What lies outside the range of the curvature: against projections that are written out, in double precision."""

import pytest
import torch
from torch.utils.data import TensorDataset

from lightning_dtda.errors import AttributionError
from lightning_dtda.estimators import ExactHessian, GaussNewton, Hessian
from lightning_dtda.estimators.estimator import Question
from lightning_dtda.estimators.null_space import null_space_response, range_share
from tests.estimators.small_runs import Regressor

CUTOFF = 1e-2
"""Of the largest eigenvalue: some eigenvalues are above it, some below, none close."""

STEPS = 12
RATE = 0.2
GROUPS = [[0, 3, 8], [5]]
CURVATURES = {
    "Gauss-Newton": (GaussNewton(cutoff=CUTOFF), "gauss_newton"),
    "Hessian": (ExactHessian(cutoff=CUTOFF), "hessian"),
}

each_curvature = pytest.mark.parametrize(("curvature", "name"), CURVATURES.values(), ids=CURVATURES.keys())
each_step = pytest.mark.parametrize("step", [5, None], ids=["on the way", "at the end"])


def prediction(module, batch):
    """One number for each query."""
    return module(batch[0]).sum(1)


def at(run, step):
    """Have what is written out taken at a step, to which the training is gone through by hand."""
    run.theta = train(run, torch.ones(len(run.data), dtype=torch.float64), STEPS if step is None else step)
    return run


def train(run, weights, steps):
    """Train by hand with weights on the examples, on the recorded order of batches."""
    tensors = run.ensemble[0].theta(0)
    theta = torch.cat([tensors[name].flatten() for name in run.names])

    def loss(theta, batch):
        return (weights * run.losses(theta))[batch].mean()

    for t in range(steps):
        theta = theta - RATE * torch.func.grad(loss)(theta, run.ensemble[0].batch_indices(t))
    return theta


def projector(matrix):
    values, vectors = torch.linalg.eigh(matrix)
    kept = values.abs() > CUTOFF * values.abs().max()
    assert 0 < kept.sum() < len(values)
    shares = values.abs() / values.abs().max() / CUTOFF
    assert not ((shares > 0.99) & (shares < 1.01)).any()  # else rounding decides
    return vectors[:, kept] @ vectors[:, kept].T


def queries(count=4):
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    return TensorDataset(inputs, torch.zeros(count, 2, dtype=torch.float64))


def gradients(run):
    def predictions(theta):
        layers = run.replay.layout.unflatten(theta)
        return torch.func.functional_call(run.module.eval(), layers, (queries().tensors[0],)).sum(1)

    return torch.func.jacrev(predictions)(run.theta)


def differences_of_training(run, group, step, change=1e-5):
    """The response to a group's removal, from trainings with more and with less weight on its examples."""
    moved = []
    for sign in (1, -1):
        weights = torch.ones(len(run.data), dtype=torch.float64)
        weights[group] += sign * change
        moved.append(train(run, weights, STEPS if step is None else step))
    return -(moved[0] - moved[1]) / (2 * change)


@each_step
@each_curvature
def test_the_share_is_that_of_the_projection_written_out(trained, curvature, name, step):
    run = at(trained(Regressor()), step)
    expected = gradients(run)
    inside = expected @ projector(getattr(run, name)())
    found = range_share(run.ensemble[0], Regressor(), run.data, queries(), prediction, curvature, step)
    assert found.shape == (4,)
    torch.testing.assert_close(found, inside.square().sum(1) / expected.square().sum(1), rtol=1e-8, atol=1e-10)
    assert ((found > 0.01) & (found < 0.9999)).all()  # neither all nor nothing: the comparison says something


@each_step
@each_curvature
def test_responses_outside_the_range_are_those_of_retraining_by_hand(trained, curvature, name, step):
    run = at(trained(Regressor()), step)
    whole = torch.stack([differences_of_training(run, group, step) for group in GROUPS])
    expected = whole - whole @ projector(getattr(run, name)())
    outside, found = null_space_response(run.ensemble[0], Regressor(), run.data, curvature, GROUPS, step)
    # central differences of 1e-5 in double precision: 1e-6 of the largest response
    for actual, by_hand in ((found, whole), (outside, expected)):
        assert actual.shape == (2, run.replay.layout.size)
        torch.testing.assert_close(actual, by_hand, rtol=0, atol=1e-6 * float(whole.abs().max()))
    assert (expected.norm(dim=1) > 1e-3 * whole.norm(dim=1)).all()


def test_gradients_of_predictions_on_training_examples_are_inside_the_range(trained):
    run = trained(Regressor())
    # they are combinations of the rows of the Gauss-Newton matrix's root
    share = range_share(run.ensemble[0], Regressor(), run.data, run.data, prediction, GaussNewton())
    torch.testing.assert_close(share, torch.ones_like(share), rtol=1e-6, atol=0)


@pytest.mark.slow
def test_queries_are_measured_as_many_at_once_as_the_memory_holds(trained, monkeypatch):
    run, counts, measure = trained(Regressor()), [], Question.measure_with_gradients

    def counted(question, replay, numbers):
        counts.append(len(numbers))
        return measure(question, replay, numbers)

    monkeypatch.setattr(Question, "measure_with_gradients", counted)
    arguments = run.ensemble[0], Regressor(), run.data, queries(1000), prediction, GaussNewton(cutoff=CUTOFF)
    whole, parts = range_share(*arguments), range_share(*arguments, memory_budget=2**-12)
    # of a quarter of a MiB, half; four vectors of 37 numbers for each
    assert counts == [1000, 110, 110, 110, 110, 110, 110, 110, 110, 110, 10]
    torch.testing.assert_close(parts, whole, rtol=1e-10, atol=1e-12)


def test_curvatures_without_a_spectrum_are_refused(trained):
    run = trained(Regressor())
    arguments = run.ensemble[0], Regressor(), run.data
    for curvature in (GaussNewton("cg"), Hessian("cg")):
        with pytest.raises(AttributionError, match=r"no spectrum, so there is no range.*Use GaussNewton"):
            range_share(*arguments, queries(), prediction, curvature)
        with pytest.raises(AttributionError, match=r"no spectrum, so there is no range.*Use GaussNewton"):
            null_space_response(*arguments, curvature, GROUPS)
    with pytest.raises(AttributionError, match="Leave projection out"):
        range_share(*arguments, queries(), prediction, GaussNewton(projection=8))


@pytest.mark.parametrize("step", [0, STEPS + 1, True, 2.0])
def test_steps_that_there_are_not_are_refused(trained, step):
    run = trained(Regressor())
    with pytest.raises(AttributionError, match=r"Give 1 to 12, or None"):
        range_share(run.ensemble[0], Regressor(), run.data, queries(), prediction, GaussNewton(), step)
