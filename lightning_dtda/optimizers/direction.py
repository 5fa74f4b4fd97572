"""The direction that an optimizer is given to descend: the gradient with the sign and the decay that the user chose."""

from __future__ import annotations

from torch import Tensor

from lightning_dtda.optimizers.arithmetic import add_scaled, is_nonzero
from lightning_dtda.optimizers.update import Hyperparameters


def direction(theta: Tensor, gradient: Tensor, hyperparameters: Hyperparameters) -> Tensor:
    r"""Return :math:`h_t = \pm g_t + \gamma\theta_t` ``(..., P)``, minus with ``maximize``."""
    weight_decay = hyperparameters["weight_decay"]
    signed = -gradient if hyperparameters.get("maximize") else gradient
    return add_scaled(signed, theta, weight_decay) if is_nonzero(weight_decay) else signed


def penalty(hyperparameters: Hyperparameters) -> float:
    r"""Return :math:`\gamma`: what the decay adds to the Hessian of the loss, or of its negative with ``maximize``."""
    return float(hyperparameters["weight_decay"])


def direction_adjoint(
    theta_cotangent: Tensor, direction_cotangent: Tensor, hyperparameters: Hyperparameters
) -> tuple[Tensor, Tensor]:
    """Return the cotangents of parameters and gradient, the former with what came to them on other ways."""
    weight_decay = hyperparameters["weight_decay"]
    if is_nonzero(weight_decay):
        theta_cotangent = add_scaled(theta_cotangent, direction_cotangent, weight_decay)
    return theta_cotangent, -direction_cotangent if hyperparameters.get("maximize") else direction_cotangent
