"""torch's optimizers in all their settings, and points of short trainings with them."""

import math

import pytest
import torch

from lightning_dtda.optimizers import UPDATES, Muon

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
    "NAdam": (torch.optim.NAdam, {}),
    "NAdam with weight decay": (torch.optim.NAdam, {"weight_decay": 0.1, "betas": (0.7, 0.9), "momentum_decay": 0.5}),
    "NAdam with everything": (
        torch.optim.NAdam,
        {"weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True, "eps": 1e-3},
    ),
    "RAdam": (torch.optim.RAdam, {}),
    "RAdam in its first steps": (torch.optim.RAdam, {"betas": (0.7, 0.6), "weight_decay": 0.1}),
    "RAdam with everything": (
        torch.optim.RAdam,
        {"betas": (0.7, 0.8), "weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True, "eps": 1e-3},
    ),
    "Adamax": (torch.optim.Adamax, {}),
    "Adamax with everything": (
        torch.optim.Adamax,
        {"betas": (0.7, 0.8), "weight_decay": 0.1, "maximize": True, "eps": 1e-3},
    ),
    "Adadelta": (torch.optim.Adadelta, {}),
    "Adadelta with everything": (torch.optim.Adadelta, {"rho": 0.7, "weight_decay": 0.1, "maximize": True, "eps": 0.1}),
    "ASGD": (torch.optim.ASGD, {}),
    "ASGD with everything": (
        torch.optim.ASGD,
        {"lambd": 0.3, "alpha": 0.6, "t0": 2, "weight_decay": 0.1, "maximize": True},
    ),
}
if hasattr(torch.optim, "Muon"):
    SETTINGS |= {
        "Muon": (torch.optim.Muon, {}),
        "Muon without Nesterov": (torch.optim.Muon, {"nesterov": False, "momentum": 0.7, "weight_decay": 0.0}),
        "Muon with everything": (
            torch.optim.Muon,
            {"adjust_lr_fn": "match_rms_adamw", "ns_coefficients": (3.0, -4.0, 1.5), "ns_steps": 3, "eps": 0.1},
        ),
    }
if hasattr(torch.optim, "Adafactor"):
    SETTINGS |= {
        "Adafactor": (torch.optim.Adafactor, {}),
        "Adafactor with everything": (
            torch.optim.Adafactor,
            {"lr": 0.5, "weight_decay": 0.1, "maximize": True, "eps": (0.3, 1.5), "beta2_decay": -0.4, "d": 1.1},
        ),
    }

every_setting = pytest.mark.parametrize(("optimizer", "settings"), SETTINGS.values(), ids=SETTINGS.keys())

ROUNDED = {"Adafactor": {torch.float32: 2e-6, torch.float64: 4e-15}}
"""Optimizers whose steps are torch's but for rounding, relative: sums of squares are added up in another order."""

STEPS = 7
"""RAdam divides by its second moments from the sixth step on."""

MATRICES = (4, 3), (3, 5)
SHAPES = (4, 3), (7,), (2, 3, 2), ()


def parameters(optimizer, dtype=torch.float64):
    """One group's parameters."""
    shapes = MATRICES if optimizer.__name__ == "Muon" else SHAPES
    return [
        torch.nn.Parameter(random(math.prod(shape), seed=seed, dtype=dtype).reshape(shape))
        for seed, shape in enumerate(shapes)
    ]


def size_of(group):
    return sum(parameter.numel() for parameter in group["params"])


def update_of(optimizer):
    return UPDATES[f"{optimizer.__module__}.{optimizer.__qualname__}"]


def smooth_update_of(optimizer):
    """The update without rounding of its own, where it has any: that is what is differentiated."""
    return Muon(dtype=None) if optimizer.__name__ == "Muon" else update_of(optimizer)


def hyperparameters(optimizer, settings):
    """As a run records them: tuples spread, flags and numbers; and the parameters."""
    group = optimizer(parameters(optimizer), **{"lr": 0.1} | settings).param_groups[0]
    flat = {key: value for key, value in group.items() if not isinstance(value, tuple)}
    spread = {key: value for key, value in group.items() if isinstance(value, tuple)}
    return flat | {f"{key}.{n}": part for key, value in spread.items() for n, part in enumerate(value)}


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def random_like(parts, count, seed):
    """Cotangents or tangents of a state."""
    return {
        key: random(count, part.shape[-1], seed=seed + n, dtype=part.dtype)
        for n, (key, part) in enumerate(parts.items())
    }


def states_after(update, group, theta, gradients):
    """Every point of a short training: parameters, state and gradient before each step."""
    state = update.initial_state(theta, group)
    for step, gradient in enumerate(gradients):
        yield step, theta, state, gradient
        theta, state = update.step(theta, state, gradient, group, step=step)
