"""How far a gradient moves the parameters in all: followed with torch's own optimizers."""

import pytest
import torch

from lightning_dtda.errors import AttributionError
from lightning_dtda.optimizers import UPDATES

STEPS = 400
"""Until a momentum of 0.9 has nothing left that double precision could hold beside the parameters."""

SMALL = 1e-4
"""The gradient that is followed, beside second moments of about one: its square changes them by 1e-8."""

SETTINGS = {
    "plain": ("sgd.SGD", {"lr": 0.3}),
    "momentum": ("sgd.SGD", {"lr": 0.3, "momentum": 0.9}),
    "dampening": ("sgd.SGD", {"lr": 0.3, "momentum": 0.9, "dampening": 0.5}),
    "Nesterov": ("sgd.SGD", {"lr": 0.3, "momentum": 0.9, "nesterov": True}),
    # moments that neither grow nor fade, after so many steps that they are not corrected any more
    "Adam": ("adam.Adam", {"lr": 0.3, "betas": (0.9, 1 - 1e-9), "eps": 0.5}),
    "AdamW": ("adamw.AdamW", {"lr": 0.3, "betas": (0.9, 0.999), "eps": 0.5, "weight_decay": 0.0, "amsgrad": True}),
    "RMSprop": ("rmsprop.RMSprop", {"lr": 0.3, "alpha": 1 - 1e-15, "eps": 0.5, "momentum": 0.9, "centered": True}),
    "Adagrad": ("adagrad.Adagrad", {"lr": 0.3, "eps": 0.5, "initial_accumulator_value": 2.0}),
    # its momentum grows no more
    "NAdam": ("nadam.NAdam", {"lr": 0.3, "betas": (0.9, 1 - 1e-9), "eps": 0.5}),
    "RAdam": ("radam.RAdam", {"lr": 0.3, "betas": (0.9, 1 - 1e-9), "eps": 0.5}),
    "RAdam in its first steps": ("radam.RAdam", {"lr": 0.3, "betas": (0.9, 0.6), "eps": 0.5}),
    "Adamax": ("adamax.Adamax", {"lr": 0.3, "betas": (0.9, 1 - 1e-9), "eps": 0.5}),
    "Adadelta": ("adadelta.Adadelta", {"lr": 0.3, "rho": 1 - 1e-15, "eps": 0.5}),
    "ASGD": ("asgd.ASGD", {"lr": 0.3, "lambd": 0.0}),
}
STATES = {
    "Adam": {"exp_avg": 0.0, "exp_avg_sq": 2.0, "step": 1e11},
    "AdamW": {"exp_avg": 0.0, "exp_avg_sq": 0.0, "max_exp_avg_sq": 2.0, "step": 1e6},
    "RMSprop": {"square_avg": 2.0, "grad_avg": 0.5, "momentum_buffer": 0.0, "step": 1.0},
    "NAdam": {"exp_avg": 0.0, "exp_avg_sq": 2.0, "mu_product": 0.0, "step": 1e11},
    # of the steps after which an average is known as well as it ever will be, a half
    "RAdam": {"exp_avg": 0.0, "exp_avg_sq": 2.0, "step": 1e9},
    "RAdam in its first steps": {"exp_avg": 0.0, "exp_avg_sq": 2.0, "step": 1e6},
    "Adamax": {"exp_avg": 0.0, "exp_inf": 2.0, "step": 1e6},
    "Adadelta": {"square_avg": 2.0, "acc_delta": 1.0, "step": 1.0},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_gradient_moves_the_parameters_as_far_as_the_rate_says(name):
    path, settings = SETTINGS[name]
    parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = getattr(torch.optim, path.split(".")[1])([parameter], **settings)
    gradients = [0.0, SMALL, *[0.0] * STEPS]  # the first step of momentum is not damped
    states = {key: torch.tensor([value], dtype=torch.float64) for key, value in STATES.get(name, {}).items()}
    if states:
        states["step"] = states["step"][0]
        optimizer.state[parameter] = dict(states)
    for gradient in gradients:
        parameter.grad = torch.full_like(parameter, gradient)
        optimizer.step()
    update = UPDATES[f"torch.optim.{path}"]
    hyperparameters = {key: value for key, value in optimizer.param_groups[0].items() if key != "betas"}
    hyperparameters |= {f"betas.{number}": beta for number, beta in enumerate(settings.get("betas", ()))}
    state = {key: torch.as_tensor(value) for key, value in optimizer.state[parameter].items() if key != "step"}
    steps_before = int(states["step"]) if states else 0
    reached = update.preconditioner(state, hyperparameters, step=steps_before)
    moved = update.rate(hyperparameters, step=max(steps_before, 1)) * (1 if reached is None else float(reached)) * SMALL
    # what the small gradient, and the steps after it, change of the second moments
    assert float(parameter.detach()) == pytest.approx(-moved, rel=1e-6)


def test_adagrads_rate_falls_from_step_to_step():
    hyperparameters = {"lr": 0.3, "lr_decay": 0.5, "weight_decay": 0.0, "eps": 1e-10}
    assert UPDATES["torch.optim.adagrad.Adagrad"].rate(hyperparameters, step=4) == pytest.approx(0.1)


@pytest.mark.parametrize(("decoupled", "decay"), [(True, 0.06), (False, 0.0)])
def test_only_a_decoupled_decay_takes_from_the_parameters_beside_the_gradient(decoupled, decay):
    name = "adamw.AdamW" if decoupled else "adam.Adam"
    hyperparameters = {"lr": 0.3, "weight_decay": 0.2, "betas.0": 0.9, "betas.1": 0.999, "eps": 1e-8}
    assert UPDATES[f"torch.optim.{name}"].decoupled_decay(hyperparameters, step=4) == pytest.approx(decay)


def test_asgds_rate_and_decay_are_those_of_its_next_step():
    parameter = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = torch.optim.ASGD([parameter], lr=0.3, lambd=0.2, alpha=0.6)
    update, group = UPDATES["torch.optim.asgd.ASGD"], optimizer.param_groups[0]
    for step in range(4):
        before = float(parameter.detach())
        parameter.grad = torch.full_like(parameter, 0.5)
        optimizer.step()
        expected = before * (1 - update.decoupled_decay(group, step)) - 0.5 * update.rate(group, step)
        assert float(parameter.detach()) == pytest.approx(expected, rel=1e-7)  # its rate is kept in single precision


@pytest.mark.parametrize("name", ["Muon", "Adafactor"])
def test_optimizers_that_do_not_scale_gradients_entry_by_entry_have_no_rate(name):
    with pytest.raises(AttributionError, match=f"{name} does not define how far"):
        UPDATES[f"torch.optim.{name}"].rate({"lr": 0.1}, step=0)
