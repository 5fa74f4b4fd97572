"""The direction that an optimizer is given to descend: the gradient with the sign and the decay that the user chose."""

from __future__ import annotations

from torch import Tensor

from lightning_dtda.optimizers.arithmetic import Scale, add_scaled, is_nonzero
from lightning_dtda.optimizers.update import Hyperparameters


def direction(theta: Tensor, gradient: Tensor, hyperparameters: Hyperparameters) -> Tensor:
    r"""Return :math:`h_t = \pm g_t + \gamma\theta_t` ``(..., P)``, minus with ``maximize``.

    Without :math:`\gamma\theta_t` where the decay is decoupled (Loshchilov and Hutter, arXiv 1711.05101): it then acts
    on the parameters, see :func:`kept`.
    """
    weight_decay = _coupled(hyperparameters)
    signed = -gradient if hyperparameters.get("maximize") else gradient
    return add_scaled(signed, theta, weight_decay) if is_nonzero(weight_decay) else signed


def direction_adjoint(
    theta_cotangent: Tensor, direction_cotangent: Tensor, hyperparameters: Hyperparameters
) -> tuple[Tensor, Tensor]:
    """Return the cotangents of parameters and gradient, the former with what came to them on other ways."""
    weight_decay = _coupled(hyperparameters)
    if is_nonzero(weight_decay):
        theta_cotangent = add_scaled(theta_cotangent, direction_cotangent, weight_decay)
    return theta_cotangent, -direction_cotangent if hyperparameters.get("maximize") else direction_cotangent


def penalty(hyperparameters: Hyperparameters) -> float:
    r"""Return :math:`\gamma`: what the decay adds to the Hessian of the loss, or of its negative with ``maximize``."""
    return float(_coupled(hyperparameters))


def kept(theta: Tensor, hyperparameters: Hyperparameters) -> Tensor:
    r"""Return :math:`(1 - \eta\gamma)\theta_t` where the decay is decoupled, else :math:`\theta_t`; linear."""
    is_decoupled = hyperparameters.get("decoupled_weight_decay") and is_nonzero(hyperparameters["weight_decay"])
    return theta * (1 - hyperparameters["lr"] * hyperparameters["weight_decay"]) if is_decoupled else theta


def decoupled_decay(hyperparameters: Hyperparameters) -> float:
    r"""Return :math:`\eta\gamma` where the decay is decoupled, else 0."""
    is_decoupled = hyperparameters.get("decoupled_weight_decay")
    return float(hyperparameters["lr"]) * float(hyperparameters["weight_decay"]) if is_decoupled else 0.0


def _coupled(hyperparameters: Hyperparameters) -> Scale:
    decay: Scale = 0.0 if hyperparameters.get("decoupled_weight_decay") else hyperparameters["weight_decay"]
    return decay
