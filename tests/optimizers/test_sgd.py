"""The update against torch's own optimizer, its adjoint against automatic differentiation."""

import itertools

import pytest
import torch

from lightning_dtda.optimizers import SGD

SETTINGS = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "dampening": {"momentum": 0.9, "dampening": 0.3},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "weight decay": {"weight_decay": 0.1},
    "everything": {"momentum": 0.8, "dampening": 0.2, "weight_decay": 0.1, "maximize": True},
    "nesterov and weight decay": {"momentum": 0.8, "nesterov": True, "weight_decay": 0.1},
}


def hyperparameters(settings):
    return {"lr": 0.1, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0} | settings


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_are_bitwise_those_of_torch(settings, dtype):
    generator = torch.Generator().manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(50, generator=generator, dtype=dtype))
    optimizer = torch.optim.SGD([parameter], **hyperparameters(settings))
    theta = parameter.detach().clone()
    state = SGD().initial_state(theta, hyperparameters(settings))
    for step in range(5):
        gradient = torch.randn(50, generator=generator, dtype=dtype)
        parameter.grad = gradient
        optimizer.step()
        theta, state = SGD().step(theta, state, gradient, hyperparameters(settings), first=step == 0)
        assert torch.equal(theta, parameter)


def test_hyperparameters_may_differ_between_stacked_runs():
    theta, gradient = torch.randn(2, 5), torch.randn(2, 5)
    rates = [0.1, 0.3]
    separate = [
        SGD().step(theta[run], {}, gradient[run], hyperparameters({"lr": rate}), first=True)[0]
        for run, rate in enumerate(rates)
    ]
    stacked, _ = SGD().step(theta, {}, gradient, hyperparameters({"lr": torch.tensor([[0.1], [0.3]])}), first=True)
    torch.testing.assert_close(stacked, torch.stack(separate))


@pytest.mark.parametrize(("settings", "first"), list(itertools.product(SETTINGS.values(), [True, False])), ids=str)
def test_adjoint_is_the_transposed_derivative(settings, first):
    group = hyperparameters(settings)
    theta, gradient, buffer, theta_cotangent, buffer_cotangent = torch.randn(
        5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    momentum = group["momentum"] != 0
    state = {"momentum_buffer": buffer} if momentum else {}
    cotangent = {"momentum_buffer": buffer_cotangent} if momentum else {}
    _, pull_back = torch.func.vjp(
        lambda theta, state, gradient: SGD().step(theta, state, gradient, group, first=first), theta, state, gradient
    )
    expected = pull_back((theta_cotangent, cotangent))
    found = SGD().adjoint(theta, state, gradient, group, theta_cotangent, cotangent, first=first)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)
