"""What torch's autograd can do with a step of every case, by itself: first and second derivatives in float64."""

import random

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

SECOND = 1
"""The step looked at: residual branches that begin at zero stand on a kink of the loss in the first one."""


@pytest.fixture(autouse=True)
def _no_fast_path():
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(enabled)


def at_second_step(case, look, **arguments):
    """Train until the second step is about to begin, call ``look(module, loss)`` there, and return what it returns.

    ``loss()`` computes the loss of that step, with the same random draws every time.
    """
    found = []

    def start(trainer, module, batch, batch_idx):
        if trainer.global_step != SECOND:
            return
        states = torch.get_rng_state(), np.random.get_state(), random.getstate()

        def loss():
            torch.set_rng_state(states[0])
            np.random.set_state(states[1])
            random.setstate(states[2])
            with trainer.precision_plugin.train_step_context(), sdpa_kernel(SDPBackend.MATH):
                output = module.training_step(batch, batch_idx)
            return output["loss"] if isinstance(output, dict) else output

        found.append(look(module, loss))

    module, data = case.make(0, float64="precision" in arguments)
    case.trainer(case.callback(on_train_batch_start=start), **arguments).fit(module, data)
    return found[0]


def trained_weights(module):
    return {name: weight for name, weight in module.named_parameters() if weight.requires_grad}


def test_the_parameters_that_get_no_gradient_are_those_listed(case):
    def look(module, loss):
        weights = trained_weights(module)
        gradients = torch.autograd.grad(loss(), weights.values(), allow_unused=True)
        return [name for name, gradient in zip(weights, gradients, strict=True) if gradient is None], list(weights)

    missing, names = at_second_step(case, look)
    assert missing == [name for name in names if name.startswith(case.unused)]


def test_hessian_products_agree_with_finite_differences(case):
    # seen: up to 1e-8 in float64; up to 1e-4 where the loss is rounded to float32, which asks for a longer step
    step, tolerance = (1e-4, 1e-3) if case.float32_inside else (1e-7, 1e-6)

    def look(module, loss):
        weights = [weight for name, weight in trained_weights(module).items() if not name.startswith(case.unused)]
        generator = torch.Generator().manual_seed(0)
        direction = [torch.randn(weight.shape, generator=generator, dtype=weight.dtype) for weight in weights]

        gradient = torch.autograd.grad(loss(), weights, create_graph=True)
        slope = sum((one * other).sum() for one, other in zip(gradient, direction, strict=True))
        product = torch.autograd.grad(slope, weights, materialize_grads=True)

        def gradient_at(distance):
            with torch.no_grad():
                torch._foreach_add_(weights, direction, alpha=distance)
            gradient = torch.autograd.grad(loss(), weights)
            with torch.no_grad():
                torch._foreach_add_(weights, direction, alpha=-distance)
            return gradient

        ahead, behind = gradient_at(step), gradient_at(-step)
        difference = [(one - other) / (2 * step) for one, other in zip(ahead, behind, strict=True)]
        return flat(product), flat(difference)

    product, difference = at_second_step(case, look, precision="64-true")
    assert product.norm() > 0
    assert (product - difference).norm() < tolerance * difference.norm()


def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])
