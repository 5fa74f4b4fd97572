"""``torch.optim.Muon``: momentum, made nearly orthogonal matrix by matrix."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_dtda.optimizers.arithmetic import Scale, add_scaled
from lightning_dtda.optimizers.shapes import flatten, split
from lightning_dtda.optimizers.update import Hyperparameters, State, Update

MOMENTUM_BUFFER = "momentum_buffer"


class Muon(Update):
    r"""Muon (Jordan et al., *Muon: An optimizer for hidden layers in neural networks*, 2024) as torch computes it.

    With momentum :math:`\mu`, for each matrix of shape :math:`(A, B)`:

    .. math::
        b_{t+1} = \mu b_t + (1 - \mu) g_t, \qquad u_t = \mu b_{t+1} + (1 - \mu) g_t \;(\text{Nesterov}), \quad
        b_{t+1} \;(\text{else}), \qquad \theta_{t+1} = (1 - \eta\gamma)\theta_t - \eta c\, O_K(u_t),

    where c depends on the shape and :math:`O_K` is a Newton-Schulz iteration that brings singular values close to one:

    .. math:: X_0 = u / \max(\lVert u \rVert, \epsilon), \qquad X_{k+1} = a X_k + (b G_k + c' G_k^2) X_k, \qquad
        G_k = X_k X_k^\top.

    The iteration computes in bfloat16, as in torch. This makes the step a staircase, whose derivative is zero or
    infinite, so the derivative is taken through the same iteration in the precision of the parameters, from the same u.

    Args:
        dtype: Data type of the iteration in :meth:`step`; ``None`` for the precision of the parameters.
    """

    def __init__(self, dtype: torch.dtype | None = torch.bfloat16) -> None:
        self.dtype = dtype
        # a replay in double precision was at most 4 units away from a training in single precision
        self.rounding = 0.0 if dtype is None else 16 * torch.finfo(dtype).eps

    def initial_state(self, theta: Tensor, hyperparameters: Hyperparameters) -> State:
        """Return a zero momentum buffer."""
        return {MOMENTUM_BUFFER: torch.zeros_like(theta)}

    def step(
        self, theta: Tensor, state: State, gradient: Tensor, hyperparameters: Hyperparameters, *, step: int
    ) -> tuple[Tensor, State]:
        """Return the parameters ``(..., P)`` and the state after one step."""
        momentum, parameters = hyperparameters["momentum"], hyperparameters["params"]
        buffer = torch.lerp(state[MOMENTUM_BUFFER], gradient, 1 - momentum)
        update = torch.lerp(gradient, buffer, momentum) if hyperparameters["nesterov"] else buffer
        decayed = theta * (1 - hyperparameters["lr"] * hyperparameters["weight_decay"])
        parts = [
            add_scaled(part, flatten([self._orthogonal(matrices, hyperparameters)], theta), -rate)
            for part, matrices, rate in zip(
                decayed.split([parameter.numel() for parameter in parameters], -1),
                split(update, parameters),
                [_rate(hyperparameters, parameter) for parameter in parameters],
                strict=True,
            )
        ]
        return torch.cat(parts, -1), {MOMENTUM_BUFFER: buffer}

    def adjoint(
        self, theta: Tensor, state: State, gradient: Tensor, hyperparameters: Hyperparameters, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, State, Tensor]:
        """Return the cotangents before the step, differentiating the iteration without its rounding."""
        return Update.adjoint(Muon(dtype=None), theta, state, gradient, hyperparameters, *args, **kwargs)

    def _orthogonal(self, matrices: Tensor, hyperparameters: Hyperparameters) -> Tensor:
        """Make each of the matrices ``(..., A, B)`` nearly orthogonal."""

        def of_one(matrix: Tensor) -> Tensor:
            a, b, c = (hyperparameters[f"ns_coefficients.{n}"] for n in range(3))
            is_tall = matrix.shape[0] > matrix.shape[1]
            x = matrix if self.dtype is None else matrix.to(self.dtype)
            x = x.T if is_tall else x
            x = x / x.norm().clamp(min=hyperparameters["eps"])
            for _ in range(int(hyperparameters["ns_steps"])):
                gram = x @ x.T
                x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
            return x.T if is_tall else x

        flat = matrices.reshape(-1, *matrices.shape[-2:])
        # one at a time to match torch bit for bit: products of stacked matrices round differently
        found = torch.vmap(of_one)(flat) if self.dtype is None else torch.stack([of_one(matrix) for matrix in flat])
        return found.reshape(matrices.shape)


def _rate(hyperparameters: Hyperparameters, parameter: Tensor) -> Scale:
    rows, columns = parameter.shape
    adjust = hyperparameters["adjust_lr_fn"]
    ratio = 0.2 * math.sqrt(max(rows, columns)) if adjust == "match_rms_adamw" else math.sqrt(max(1, rows / columns))
    rate: Scale = hyperparameters["lr"] * ratio
    return rate
