"""Tangents against the adjoints whose transposes they are, and against forward-mode differentiation and differences."""

import torch

from lightning_dtda.optimizers import GroupedUpdate, Update
from tests.optimizers.settings import (
    SETTINGS,
    STEPS,
    every_setting,
    hyperparameters,
    random,
    random_like,
    size_of,
    smooth_update_of,
    states_after,
    update_of,
)

REMOVALS = 3


def dot(first, second):
    return sum((first[key] * second[key]).sum() for key in first)


def tangents_of(theta, state, seed):
    of_theta, of_gradient = (random(REMOVALS, len(theta), seed=seed + n) for n in range(2))
    return of_theta, random_like(state, REMOVALS, seed=seed + 2), of_gradient


def assert_transposed(update, group, step, point):
    """<tangents after, cotangents after> is <tangents before, cotangents before>."""
    before = tangents_of(*point[:2], seed=20 + step)
    after = update.tangent(*point, group, *before, step=step)
    cotangents = random(REMOVALS, len(point[0]), seed=40), random_like(point[1], REMOVALS, seed=41)
    pulled = update.adjoint(*point, group, *cotangents, step=step)
    forward = (after[0] * cotangents[0]).sum() + dot(after[1], cotangents[1])
    reverse = (before[0] * pulled[0]).sum() + dot(before[1], pulled[1]) + (before[2] * pulled[2]).sum()
    assert forward.isfinite()
    torch.testing.assert_close(forward, reverse, rtol=1e-12, atol=1e-12)


@every_setting
def test_tangents_and_cotangents_have_one_product_before_and_after_a_step(optimizer, settings):
    update, group = update_of(optimizer), hyperparameters(optimizer, settings)
    size = size_of(group)
    for step, *point in states_after(update, group, random(size), random(STEPS, size, seed=1)):
        assert_transposed(update, group, step, point)


@every_setting
def test_so_they_have_where_second_moments_are_zero(optimizer, settings):
    update, group = update_of(optimizer), hyperparameters(optimizer, settings)
    zeros = torch.zeros(STEPS, size_of(group), dtype=torch.float64)
    for step, *point in states_after(update, group, zeros[0], zeros):
        assert_transposed(update, group, step, point)


@every_setting
def test_tangents_are_the_derivatives_of_the_step(optimizer, settings):
    update, group = smooth_update_of(optimizer), hyperparameters(optimizer, settings)
    size = size_of(group)
    for step, *point in states_after(update, group, random(size), random(STEPS, size, seed=1)):
        tangents = tangents_of(*point[:2], seed=20)
        found = update.tangent(*point, group, *tangents, step=step)
        for removal in range(REMOVALS):
            along = (
                tangents[0][removal],
                {key: part[removal] for key, part in tangents[1].items()},
                tangents[2][removal],
            )
            _, expected = torch.func.jvp(lambda *at, step=step: update.step(*at, group, step=step), tuple(point), along)
            torch.testing.assert_close(found[0][removal], expected[0], rtol=1e-10, atol=1e-12)
            for key, part in expected[1].items():
                torch.testing.assert_close(found[1][key][removal], part, rtol=1e-10, atol=1e-12)


@every_setting
def test_an_optimizer_without_an_adjoint_of_its_own_has_tangents_too(optimizer, settings):
    update, group = smooth_update_of(optimizer), hyperparameters(optimizer, settings)

    class OnlySteps(type(update)):
        adjoint = Update.adjoint

    only_steps = OnlySteps.__new__(OnlySteps)
    only_steps.__dict__.update(update.__dict__)
    size = size_of(group)
    *_, (step, *point) = states_after(update, group, random(size), random(STEPS, size, seed=1))
    tangents = tangents_of(*point[:2], seed=20)
    torch.testing.assert_close(
        only_steps.tangent(*point, group, *tangents, step=step),
        update.tangent(*point, group, *tangents, step=step),
        rtol=1e-10,
        atol=1e-12,
    )


def test_groups_have_tangents_each_with_its_own_settings():
    groups = [hyperparameters(*SETTINGS[name]) for name in ("SGD with everything", "SGD with Nesterov")]
    update = update_of(torch.optim.SGD)
    slices = slice(0, 2), slice(2, 6)
    grouped = GroupedUpdate(update, slices, ((), ()))
    theta, gradient = random(6), random(6, seed=1)
    states = [{"momentum_buffer": random(part.stop - part.start, seed=2)} for part in slices]
    of_theta, of_gradient = random(REMOVALS, 6, seed=3), random(REMOVALS, 6, seed=4)
    of_states = [{"momentum_buffer": random(REMOVALS, part.stop - part.start, seed=5)} for part in slices]
    found, found_states = grouped.tangent(theta, states, gradient, groups, of_theta, of_states, of_gradient, step=1)
    for number, part in enumerate(slices):
        expected, state = update.tangent(
            theta[part],
            states[number],
            gradient[part],
            groups[number],
            of_theta[:, part],
            of_states[number],
            of_gradient[:, part],
            step=1,
        )
        assert torch.equal(found[:, part], expected)
        assert torch.equal(found_states[number]["momentum_buffer"], state["momentum_buffer"])
