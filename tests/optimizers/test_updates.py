"""Updates against torch's own optimizers, adjoints against automatic differentiation and finite differences."""

import itertools

import pytest
import torch

from lightning_dtda.optimizers import UPDATES, GroupedUpdate, Update

SETTINGS = {
    "SGD": (torch.optim.SGD, {}),
    "SGD with momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "SGD with dampening": (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.3}),
    "SGD with Nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "SGD with weight decay": (torch.optim.SGD, {"weight_decay": 0.1}),
    "SGD with Nesterov and weight decay": (torch.optim.SGD, {"momentum": 0.8, "nesterov": True, "weight_decay": 0.1}),
    "SGD with everything": (
        torch.optim.SGD,
        {"momentum": 0.8, "dampening": 0.2, "weight_decay": 0.1, "maximize": True},
    ),
    "Adam": (torch.optim.Adam, {}),
    "Adam with weight decay": (torch.optim.Adam, {"weight_decay": 0.1, "betas": (0.7, 0.9)}),
    "Adam with amsgrad": (torch.optim.Adam, {"amsgrad": True, "maximize": True, "eps": 1e-3}),
    "AdamW": (torch.optim.AdamW, {"weight_decay": 0.1}),
    "AdamW with amsgrad": (torch.optim.AdamW, {"weight_decay": 0.1, "amsgrad": True, "maximize": True}),
    "AdamW without decay": (torch.optim.AdamW, {"weight_decay": 0.0}),
    "RMSprop": (torch.optim.RMSprop, {}),
    "RMSprop with momentum": (torch.optim.RMSprop, {"momentum": 0.9, "weight_decay": 0.1}),
    "RMSprop centered": (torch.optim.RMSprop, {"centered": True, "momentum": 0.5, "maximize": True}),
    "Adagrad": (torch.optim.Adagrad, {}),
    "Adagrad with everything": (
        torch.optim.Adagrad,
        {"lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.3, "maximize": True},
    ),
}

every_setting = pytest.mark.parametrize(("optimizer", "settings"), SETTINGS.values(), ids=SETTINGS.keys())


def update_of(optimizer):
    return UPDATES[f"{optimizer.__module__}.{optimizer.__qualname__}"]


def hyperparameters(optimizer, settings):
    """As a run records them: tuples spread, flags and numbers."""
    group = optimizer([torch.zeros(1)], lr=0.1, **settings).param_groups[0]
    flat = {key: value for key, value in group.items() if key != "params" and not isinstance(value, tuple)}
    return flat | {f"betas.{n}": beta for n, beta in enumerate(group.get("betas", ()))}


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def states_after(update, group, theta, gradients):
    """Every point of a short training: parameters, state and gradient before each step."""
    state = update.initial_state(theta, group)
    for step, gradient in enumerate(gradients):
        yield step, theta, state, gradient
        theta, state = update.step(theta, state, gradient, group, step=step)


@every_setting
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_are_bitwise_those_of_torch(optimizer, settings, dtype):
    parameter = torch.nn.Parameter(random(50, dtype=dtype))
    torchs_own = optimizer([parameter], lr=0.1, **settings)
    update, group = update_of(optimizer), hyperparameters(optimizer, settings)
    theta, state = parameter.detach().clone(), update.initial_state(parameter.detach(), group)
    for step in range(5):
        gradient = random(50, seed=step + 1, dtype=dtype)
        parameter.grad = gradient.clone()
        torchs_own.step()
        theta, state = update.step(theta, state, gradient, group, step=step)
        assert torch.equal(theta, parameter)
        for key, value in state.items():
            assert torch.equal(value, torchs_own.state[parameter][key]), key


@every_setting
def test_learning_rates_may_differ_between_stacked_runs(optimizer, settings):
    update, group = update_of(optimizer), hyperparameters(optimizer, settings)
    theta, gradients, rates = random(2, 5), random(3, 2, 5, seed=1), [0.1, 0.3]
    stacked = group | {"lr": torch.tensor(rates, dtype=torch.float64)[:, None]}
    ends = {}
    for name, of_run, rate in (("stacked", slice(None), stacked["lr"]), ("first", 0, 0.1), ("second", 1, 0.3)):
        *_, last = states_after(update, group | {"lr": rate}, theta[of_run], gradients[:, of_run])
        ends[name] = last[1]
    torch.testing.assert_close(ends["stacked"], torch.stack([ends["first"], ends["second"]]))


@every_setting
def test_adjoints_are_the_transposed_derivatives(optimizer, settings):
    update, group = update_of(optimizer), hyperparameters(optimizer, settings)
    queries, size = 3, 6
    for step, theta, state, gradient in states_after(update, group, random(size), random(4, size, seed=1)):
        cotangent = random(queries, size, seed=2 + step)
        states = {key: random(queries, size, seed=10 + step + n) for n, key in enumerate(state)}
        point = theta, state, gradient, group, cotangent, states
        torch.testing.assert_close(
            update.adjoint(*point, step=step), Update.adjoint(update, *point, step=step), rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("later", [True, False], ids=["with gradients later", "without"])
@every_setting
def test_adjoints_are_finite_and_right_where_a_second_moment_is_zero(optimizer, settings, later):
    if settings.get("centered"):
        pytest.skip("its variance may fall below zero by rounding, in torch too: see the test below")
    update, group = update_of(optimizer), hyperparameters(optimizer, settings)
    if "eps" in group:  # the update bends where gradients are as large as eps; differences have to stay below
        group["eps"] = 0.5
    gradients = torch.zeros(3, 4, dtype=torch.float64)
    if later:
        gradients[2] = random(4, seed=1)
    gradients[:, 0] = 0  # an entry whose gradient is always zero, as behind a dead unit
    theta = torch.zeros(4, dtype=torch.float64)  # weight decay makes no gradient either

    def end(first_gradient):
        changed = torch.cat([first_gradient[None], gradients[1:]])
        state, point = update.initial_state(theta, group), theta
        for step, gradient in enumerate(changed):
            point, state = update.step(point, state, gradient, group, step=step)
        return point

    points = list(states_after(update, group, theta, gradients))
    cotangent = torch.ones(4, dtype=torch.float64)
    states = {key: torch.zeros_like(value) for key, value in points[0][2].items()}
    for step, point, state, gradient in reversed(points):
        cotangent, states, of_gradient = update.adjoint(point, state, gradient, group, cotangent, states, step=step)
        assert of_gradient.isfinite().all()
    moved = 1e-6  # all entries at once: they do not act on each other
    expected = (end(gradients[0] + moved) - end(gradients[0] - moved)) / (2 * moved)
    torch.testing.assert_close(of_gradient, expected, rtol=1e-4, atol=1e-6)


def test_a_centered_second_moment_of_zero_gives_a_finite_adjoint():
    update, group = update_of(torch.optim.RMSprop), hyperparameters(torch.optim.RMSprop, {"centered": True})
    zeros = torch.zeros(4, dtype=torch.float64)
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
    grouped = GroupedUpdate(update_of(torch.optim.SGD), (slice(0, 3), slice(3, 7)))
    theta = torch.cat([p.detach() for p in parameters])
    states = grouped.initial_states(theta, groups)
    for step in range(3):
        gradient = random(7, seed=step + 20)
        parameters[0].grad, parameters[1].grad = gradient[:3].clone(), gradient[3:].clone()
        torchs_own.step()
        theta, states = grouped.step(theta, states, gradient, groups, step=step)
    assert torch.equal(theta, torch.cat([p.detach() for p in parameters]))
