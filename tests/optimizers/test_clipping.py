"""Clipping against torch's own functions, adjoints and tangents against automatic differentiation."""

import pytest
import torch

from lightning_dtda.optimizers import clipping
from lightning_dtda.optimizers.clipping import NormClipping
from tests.optimizers.settings import random

SETTINGS = {
    "nothing": (None, None),
    "norm, clipped": (0.5, "norm"),
    "norm, not clipped": (100.0, "norm"),
    "norm is the default": (0.5, None),
    "value": (0.7, "value"),
}
GRADIENTS = torch.randn(3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(("value", "algorithm"), SETTINGS.values(), ids=SETTINGS)
def test_gradients_are_clipped_as_torch_clips_them(value, algorithm):
    parameters = [torch.nn.Parameter(torch.zeros(n, dtype=torch.float64)) for n in (2, 4)]
    for gradient in GRADIENTS:
        for parameter, part in zip(parameters, gradient.split([2, 4]), strict=True):
            parameter.grad = part.clone()
        if algorithm == "value":
            torch.nn.utils.clip_grad_value_(parameters, value)
        elif value:
            torch.nn.utils.clip_grad_norm_(parameters, value)
        expected = torch.cat([parameter.grad for parameter in parameters])
        torch.testing.assert_close(clipping(value, algorithm).apply(gradient), expected, rtol=1e-15, atol=0)


@pytest.mark.parametrize(("value", "algorithm"), SETTINGS.values(), ids=SETTINGS)
def test_adjoints_are_the_transposed_derivatives_of_each_run(value, algorithm):
    function = clipping(value, algorithm)
    cotangents = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = function.adjoint(GRADIENTS.unsqueeze(1), cotangents)
    for run, gradient in enumerate(GRADIENTS):
        _, pull_back = torch.func.vjp(function.apply, gradient)
        expected = torch.stack([pull_back(cotangent)[0] for cotangent in cotangents[run]])
        torch.testing.assert_close(found[run], expected, rtol=1e-13, atol=1e-14)


def test_the_gradient_before_clipping_is_had_from_its_norm():
    norms = GRADIENTS.norm(dim=1, keepdim=True)
    function = NormClipping(float(norms.median()))  # clips one of them
    torch.testing.assert_close(function.unclipped(function.apply(GRADIENTS), norms), GRADIENTS)


def test_the_adjoint_of_a_zero_gradient_is_finite():
    zeros, ones = torch.zeros(4), torch.ones(4)
    assert torch.equal(NormClipping(1.0).adjoint(zeros, ones), ones)


@pytest.mark.parametrize(("value", "algorithm"), SETTINGS.values(), ids=SETTINGS)
def test_tangents_of_clipping_are_its_derivatives(value, algorithm):
    function = clipping(value, algorithm)
    tangents = random(3, 5, 6, seed=1)
    found = function.tangent(GRADIENTS.unsqueeze(1), tangents)
    for run, gradient in enumerate(GRADIENTS):
        for tangent, pushed in zip(tangents[run], found[run], strict=True):
            _, expected = torch.func.jvp(function.apply, (gradient,), (tangent,))
            torch.testing.assert_close(pushed, expected, rtol=1e-13, atol=1e-14)
