"""``torch.optim.Adafactor``: second moments of matrices estimated from those of their rows and columns."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_dtda.optimizers.shapes import flatten, split
from lightning_dtda.optimizers.update import Hyperparameters, State, Update

ROWS, COLUMNS, ENTRIES = "row_var", "col_var", "variance"


class Adafactor(Update):
    r"""Adafactor (Shazeer and Stern, arXiv 1804.04235, algorithms 4 and 5) as torch computes it, except for rounding.

    With :math:`1 - \beta_t = (t + 1)^\delta` and mean squares over rows and columns, for each matrix:

    .. math::
        R_{t+1} = \beta_t R_t + (1 - \beta_t)\, \overline{g_t^2}^{\,\text{row}}, \qquad
        C_{t+1} = \beta_t C_t + (1 - \beta_t)\, \overline{g_t^2}^{\,\text{column}}, \qquad
        \hat v = \frac{R_{t+1} C_{t+1}}{\max(\overline{R_{t+1}}, \epsilon_1)},

    and :math:`\hat v = v_{t+1} = \beta_t v_t + (1 - \beta_t) g_t^2` for each vector. Then, with
    :math:`\operatorname{rms}(x) = \lVert x \rVert / \sqrt{P}` over the parameter:

    .. math::
        u_t = \frac{g_t}{\sqrt{\max(\hat v, \epsilon_1^2)}}, \qquad
        \theta_{t+1} = (1 - \eta\gamma)\theta_t -
        \frac{\max(\epsilon_2, \operatorname{rms}(\theta_t)) \min(\eta, 1 / \sqrt{t + 1})}
        {\max(1, \operatorname{rms}(u_t) / d)}\, u_t.
    """

    def initial_state(self, theta: Tensor, hyperparameters: Hyperparameters) -> State:
        """Return zero moments."""
        sizes: dict[str, int] = {}
        for parameter in hyperparameters["params"]:
            for name, part in _moments(parameter).items():
                sizes[name] = sizes.get(name, 0) + part.numel()
        return {name: theta.new_zeros(*theta.shape[:-1], size) for name, size in sizes.items()}

    def step(
        self, theta: Tensor, state: State, gradient: Tensor, hyperparameters: Hyperparameters, *, step: int
    ) -> tuple[Tensor, State]:
        """Return the parameters ``(..., P)`` and the state after one step."""
        parameters = hyperparameters["params"]
        of_moments = [_moments(parameter) for parameter in parameters]
        before = {
            name: iter(split(part, [moments[name] for moments in of_moments if name in moments]))
            for name, part in state.items()
        }
        after: dict[str, list[Tensor]] = {name: [] for name in state}

        def smoothed(name: str, squares: Tensor) -> Tensor:
            after[name].append(torch.lerp(next(before[name]), squares, (step + 1.0) ** hyperparameters["beta2_decay"]))
            return after[name][-1]

        moved = []
        signed = -gradient if hyperparameters.get("maximize") else gradient
        sizes = [parameter.numel() for parameter in parameters]
        for parameter, part, g in zip(parameters, theta.split(sizes, -1), split(signed, parameters), strict=True):
            eps1 = hyperparameters["eps.0"]
            eps1 = torch.finfo(parameter.dtype).eps if eps1 is None else eps1
            squares = g.square()
            if parameter.ndim > 1:
                rows = smoothed(ROWS, squares.mean(-1, keepdim=True))
                columns = smoothed(COLUMNS, squares.mean(-2, keepdim=True))
                variance = rows @ columns / rows.mean(-2, keepdim=True).clamp(min=eps1)
            else:
                variance = smoothed(ENTRIES, squares)
            update = flatten([variance.clamp(min=eps1 * eps1).rsqrt() * g], theta)
            longest = torch.as_tensor(hyperparameters["lr"], dtype=theta.dtype, device=theta.device)
            scale = _rms(part).clamp(min=hyperparameters["eps.1"]) * longest.clamp(max=(step + 1.0) ** -0.5)
            decayed = part * (1 - hyperparameters["lr"] * hyperparameters["weight_decay"])
            moved.append(decayed - scale / (_rms(update) / hyperparameters["d"]).clamp(min=1.0) * update)
        return torch.cat(moved, -1), {name: flatten(parts, theta) for name, parts in after.items()}


def _moments(parameter: Tensor) -> dict[str, Tensor]:
    """Return tensors with the shapes of the moments that are kept for a parameter."""
    if parameter.ndim > 1:
        return {ROWS: parameter[..., :1], COLUMNS: parameter[..., :1, :]}
    return {ENTRIES: parameter}


def _rms(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True) / x.shape[-1] ** 0.5
