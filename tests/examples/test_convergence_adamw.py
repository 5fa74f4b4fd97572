"""The limit of unrolling through AdamW: the small version of the example."""

import pytest
import torch

from examples.convergence_to_influence_functions.adamw import EXAMPLES, SETTINGS, Linear, compare, limit, patients

ALL = "AdamW, one layer, all"


def fixed_point(weights):
    """Train one layer on all examples, with weights, by torch's own AdamW until nothing moves."""
    _, _, decay, eps = SETTINGS[ALL]
    torch.manual_seed(0)
    module = Linear(0, decay, eps, steps=1).double()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.02, eps=eps, weight_decay=decay, betas=(0.9, 0.99))
    inputs, targets = patients()
    for _ in range(3000):
        optimizer.zero_grad()
        (0.5 * weights * (module(inputs) - targets).square()).mean().backward()
        optimizer.step()
    return module, torch.cat([each.detach().flatten() for each in module.parameters()])


@pytest.mark.slow
def test_the_limit_on_all_examples_is_the_derivative_of_the_fixed_point():
    weights, step = torch.ones(EXAMPLES, dtype=torch.float64), 1e-4
    module, theta = fixed_point(weights)
    change = step * torch.nn.functional.one_hot(torch.tensor(5), EXAMPLES)
    moved = (fixed_point(weights - change)[1] - fixed_point(weights + change)[1]) / (2 * step)
    found = {name: limit(module, theta, EXAMPLES, name)[:, 5] for name in ("plain", "frozen", "full")}
    assert torch.allclose(found["full"], moved, rtol=1e-4, atol=1e-8)
    assert (found["frozen"] - moved).norm() > 0.02 * moved.norm()
    assert (found["plain"] - moved).norm() > 0.1 * moved.norm()


def test_on_all_examples_the_limit_is_damped_by_the_squared_preconditioner():
    _, _, decay, eps = SETTINGS[ALL]
    module, theta = fixed_point(torch.ones(EXAMPLES, dtype=torch.float64))
    inputs, targets = patients()
    gradients = (inputs @ theta - targets)[:, None] * inputs
    scale = gradients.mean(0).abs() + eps
    curvature = inputs.T @ inputs / EXAMPLES + torch.diag(decay / eps * scale.square())
    expected = torch.linalg.solve(curvature, gradients.T / EXAMPLES)
    assert torch.allclose(limit(module, theta, EXAMPLES, "full"), expected, rtol=1e-6)


@pytest.mark.slow
def test_unrolling_through_batches_comes_close_to_the_limit_with_the_change_of_the_preconditioner(tmp_path):
    rows = list(compare("AdamW, one layer, batches of 8", tmp_path, 400, 1))
    first, last = rows[0], rows[-1]
    assert last["full"] < 0.2 < 0.7 * last["frozen"] < 0.7 * last["plain"]
    assert last["full"] < 0.5 * first["full"]
    assert last["null space"] < 1e-9  # one layer has none
