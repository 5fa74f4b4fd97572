"""Scales on which responses are extrapolated: on most of them, predictions stay where the measurement can be."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_dtda.errors import AttributionError

ScaleName = Literal["linear", "sqrt", "logit"]


@dataclass(frozen=True)
class Scale:
    r"""A scale g on which a measurement is taken to be linear in the weights of the examples (the delta method).

    .. math:: y = g^{-1}\left(g(m) + g'(m)\, r\right)

    It has the slope r at m, like the linear prediction m + r, and both agree to first order. A measurement on the edge
    of the range, where g has no slope, is predicted by m + r or the edge. The square has two inverses; that of
    ``"sqrt"`` follows a residual through zero.

    Args:
        low: Lower end of the range of g.
        high: Upper end.
        to: Function g.
        slope: Derivative g'.
        back: Inverse of g.
    """

    low: float
    high: float
    to: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    back: Callable[[Tensor], Tensor]

    def __call__(self, measured: Tensor, response: Tensor) -> Tensor:
        """Return the predictions y for measurements m and responses r of shapes that broadcast."""
        moved = self.back(self.to(measured) + self.slope(measured) * response)
        inside = (measured > self.low) & (measured < self.high)
        return torch.where(inside, moved, (measured + response).clamp(self.low, self.high))


# no logarithm: its slope has no bound towards zero, where the squared error of some run often is
_SCALES: dict[str, Scale] = {
    "sqrt": Scale(0.0, math.inf, torch.sqrt, lambda m: 0.5 / m.sqrt(), torch.square),
    "logit": Scale(0.0, 1.0, torch.logit, lambda m: 1 / (m * (1 - m)), torch.sigmoid),
}


def predicted(scale: str, measured: Tensor, response: Tensor) -> Tensor:
    """Return the predictions on a scale, by its name."""
    return measured + response if scale == "linear" else _SCALES[scale](measured, response)


def check_scale(scale: str, measured: Tensor, what: str) -> None:
    """Check that a scale suits a measurement.

    Args:
        scale: Name of the scale.
        measured: Measurements.
        what: Name of the measurement, for the message.

    Raises:
        AttributionError: If the scale is unknown, or a measurement is outside its range.
    """
    if scale not in get_args(ScaleName):
        raise AttributionError(f"scale={scale!r}; choose from {', '.join(get_args(ScaleName))}.")
    if scale == "linear":
        return
    low, high = _SCALES[scale].low, _SCALES[scale].high
    outside = measured[(measured < low) | (measured > high)]
    if len(outside):
        limits = f"from {low:g} to {high:g}" if math.isfinite(high) else f"of at least {low:g}"
        raise AttributionError(
            f'scale="{scale}" is for measurements {limits}, but the {what} is {float(outside[0]):.3g} in some run. Use '
            'scale="linear".'
        )
