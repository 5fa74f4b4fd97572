"""Updates against torch's own optimizers, adjoints against automatic differentiation and finite differences."""

import itertools

import pytest
import torch
from torch.utils._pytree import tree_map

from lightning_dtda.optimizers import GroupedUpdate
from tests.optimizers.settings import (
    ROUNDED,
    SETTINGS,
    STEPS,
    every_setting,
    hyperparameters,
    parameters,
    random,
    random_like,
    size_of,
    smooth_update_of,
    states_after,
    update_of,
)


def flat(tensors):
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def end_of(update, group, theta, gradients):
    state = update.initial_state(theta, group)
    for step, gradient in enumerate(gradients):
        theta, state = update.step(theta, state, gradient, group, step=step)
    return theta


def pulled_back(update, group, theta, gradients, cotangent):
    """The cotangents of the initial parameters and of all gradients, through all steps."""
    points = list(states_after(update, group, theta, gradients))
    states = {key: torch.zeros_like(value) for key, value in points[0][2].items()}
    of_gradients = []
    for step, point, state, gradient in reversed(points):
        cotangent, states, of_gradient = update.adjoint(point, state, gradient, group, cotangent, states, step=step)
        of_gradients.insert(0, of_gradient)
    return cotangent, torch.stack(of_gradients)


@every_setting
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_are_bitwise_those_of_torch(optimizer, settings, dtype):
    own = parameters(optimizer, dtype)
    foreach = {} if optimizer.__name__ == "Muon" else {"foreach": False}
    torchs_own = optimizer(own, **{"lr": 0.1} | settings | foreach)
    update, group = update_of(optimizer), hyperparameters(optimizer, settings) | {"params": own}
    theta = flat(own)
    state = update.initial_state(theta, group)
    tolerance = ROUNDED.get(optimizer.__name__, {}).get(dtype, 0.0)
    for step in range(STEPS):
        gradients = [random(p.numel(), seed=100 * step + n, dtype=dtype).reshape(p.shape) for n, p in enumerate(own)]
        for parameter, gradient in zip(own, gradients, strict=True):
            parameter.grad = gradient.clone()
        torchs_own.step()
        theta, state = update.step(theta, state, flat(gradients), group, step=step)
        torch.testing.assert_close(theta, flat(own), rtol=tolerance, atol=tolerance)
        for key, value in state.items():
            kept = flat(torchs_own.state[p][key] for p in own if key in torchs_own.state[p])
            torch.testing.assert_close(value, kept[: len(value)], rtol=tolerance, atol=tolerance)


@every_setting
def test_learning_rates_may_differ_between_stacked_runs(optimizer, settings):
    update, group = update_of(optimizer), hyperparameters(optimizer, settings)
    size = size_of(group)
    theta, gradients, rates = random(2, size), random(STEPS, 2, size, seed=1), [0.1, 0.3]
    stacked = group | {"lr": torch.tensor(rates, dtype=torch.float64)[:, None]}
    ends = {}
    for name, of_run, rate in (("stacked", slice(None), stacked["lr"]), ("first", 0, 0.1), ("second", 1, 0.3)):
        ends[name] = end_of(update, group | {"lr": rate}, theta[of_run], gradients[:, of_run])
    torch.testing.assert_close(ends["stacked"], torch.stack([ends["first"], ends["second"]]))


@every_setting
def test_adjoints_are_the_transposed_derivatives(optimizer, settings):
    update, group = update_of(optimizer), hyperparameters(optimizer, settings)
    smooth, queries, size = smooth_update_of(optimizer), 3, size_of(group)
    for step, theta, state, gradient in states_after(update, group, random(size), random(STEPS, size, seed=1)):
        cotangent, states = random(queries, size, seed=2 + step), random_like(state, queries, seed=10 + step)
        found = update.adjoint(theta, state, gradient, group, cotangent, states, step=step)
        for query in range(queries):
            names = list(state)
            inputs = [part.clone().requires_grad_() for part in (theta, *state.values(), gradient)]
            moved, after = smooth.step(
                inputs[0], dict(zip(names, inputs[1:-1], strict=True)), inputs[-1], group, step=step
            )
            product = (moved * cotangent[query]).sum() + sum((after[key] * states[key][query]).sum() for key in names)
            expected = torch.autograd.grad(product, inputs, materialize_grads=True)
            of_query = [found[0][query], *(found[1][key][query] for key in names), found[2][query]]
            for one, other in zip(of_query, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@every_setting
def test_adjoints_of_stacked_runs_are_those_of_each(optimizer, settings):
    update, group = update_of(optimizer), hyperparameters(optimizer, settings)
    runs, queries, size = 2, 3, size_of(group)
    *_, (step, theta, state, gradient) = states_after(
        update, group, random(runs, 1, size), random(STEPS, runs, 1, size, seed=1)
    )
    cotangent = random(runs, queries, size, seed=2)
    states = {key: part.new_ones(runs, queries, part.shape[-1]) for key, part in state.items()}
    found = update.adjoint(theta, state, gradient, group, cotangent, states, step=step)
    for run in range(runs):
        point = tree_map(lambda part, run=run: part[run, 0], (theta, state, gradient))
        of_run, *cotangents = tree_map(lambda part, run=run: part[run], (found, cotangent, states))
        alone = update.adjoint(*point, group, *cotangents, step=step)
        torch.testing.assert_close(of_run, alone, rtol=1e-12, atol=1e-12)


@every_setting
def test_adjoints_through_many_steps_agree_with_finite_differences(optimizer, settings):
    update, group = smooth_update_of(optimizer), hyperparameters(optimizer, settings)
    size = size_of(group)
    theta, gradients, cotangent = random(size), random(STEPS, size, seed=1), random(size, seed=2)
    of_theta, of_gradients = pulled_back(update, group, theta, gradients, cotangent)

    def moved(along, theta_along, gradients_along):
        return end_of(update, group, theta + along * theta_along, gradients + along * gradients_along) @ cotangent

    for seed in range(5):
        along = random(size, seed=3 + seed), random(STEPS, size, seed=50 + seed)
        near, far = (moved(h, *along) - moved(-h, *along) for h in (1e-5, 2e-5))
        expected = (8 * near - far) / 12e-5  # of fourth order
        found = of_theta @ along[0] + (of_gradients * along[1]).sum()
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("later", [True, False], ids=["with gradients later", "without"])
@every_setting
def test_adjoints_are_finite_and_right_where_a_second_moment_is_zero(optimizer, settings, later):
    if settings.get("centered"):
        pytest.skip("its variance may fall below zero by rounding, in torch too: see the test below")
    update, group = smooth_update_of(optimizer), hyperparameters(optimizer, settings)
    size = size_of(group)
    # the update bends where gradients are as large as eps; differences have to stay below
    group |= {key: 0.5 for key in ("eps", "eps.0") if key in group}
    gradients = torch.zeros(STEPS, size, dtype=torch.float64)
    if later:
        gradients[-1] = random(size, seed=1)
    gradients[:, 0] = 0  # an entry whose gradient is always zero, as behind a dead unit
    theta = torch.zeros(size, dtype=torch.float64)  # weight decay makes no gradient either
    cotangent = torch.ones(size, dtype=torch.float64)
    of_theta, of_gradients = pulled_back(update, group, theta, gradients, cotangent)
    assert of_theta.isfinite().all()
    moved = 1e-6 * torch.eye(size, dtype=torch.float64)

    def end(moved):
        return end_of(update, group, theta, torch.cat([gradients[:1] + moved, gradients[1:]])) @ cotangent

    expected = torch.stack([end(entry) - end(-entry) for entry in moved]) / 2e-6
    torch.testing.assert_close(of_gradients[0], expected, rtol=1e-4, atol=1e-6)


@every_setting
def test_adjoints_are_finite_at_gradients_of_zero(optimizer, settings):
    update, group = update_of(optimizer), hyperparameters(optimizer, settings)
    zeros = torch.zeros(STEPS, size_of(group), dtype=torch.float64)
    for part in pulled_back(update, group, zeros[0], zeros, torch.ones_like(zeros[0])):
        assert part.isfinite().all()


def test_a_centered_second_moment_of_zero_gives_a_finite_adjoint():
    update, group = update_of(torch.optim.RMSprop), hyperparameters(torch.optim.RMSprop, {"centered": True})
    zeros = torch.zeros(size_of(group), dtype=torch.float64)
    state = update.initial_state(zeros, group)
    _, _, found = update.adjoint(zeros, state, zeros, group, zeros + 1, dict.fromkeys(state, zeros), step=0)
    torch.testing.assert_close(found, zeros - group["lr"] / group["eps"])


@pytest.mark.parametrize("pair", list(itertools.combinations(["SGD with everything", "SGD with Nesterov"], 2)), ids=str)
def test_groups_are_updated_each_with_its_own_settings(pair):
    groups = [hyperparameters(*SETTINGS[name]) for name in pair]
    parameters = [torch.nn.Parameter(random(n, seed=n)) for n in (3, 4)]
    torchs_own = torch.optim.SGD(
        [{"params": [p], "lr": 0.1, **SETTINGS[name][1]} for p, name in zip(parameters, pair, strict=True)]
    )
    grouped = GroupedUpdate(update_of(torch.optim.SGD), (slice(0, 3), slice(3, 7)), tuple((p,) for p in parameters))
    theta = torch.cat([p.detach() for p in parameters])
    states = grouped.initial_states(theta, groups)
    for step in range(3):
        gradient = random(7, seed=step + 20)
        parameters[0].grad, parameters[1].grad = gradient[:3].clone(), gradient[3:].clone()
        torchs_own.step()
        theta, states = grouped.step(theta, states, gradient, groups, step=step)
    assert torch.equal(theta, torch.cat([p.detach() for p in parameters]))
