"""Whether the measurement's distribution changes in any way, without a pairing of its samples."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_dtda.statistics.differences.difference import Difference


class Energy(Difference):
    r"""Energy distance between the distributions of a one-dimensional measurement.

    .. math::
        D^2 = 2\, E|X - Y| - E|X - X'| - E|Y - Y'| = 2 \int (F_X - F_Y)^2

    of the empirical distributions (Székely and Rizzo, *Journal of Statistical Planning and Inference* 143, 2013). In
    the square root of the measurement's unit, never negative. Far values count less than in the Wasserstein distance;
    like it, D is biased upwards where the effect is small.

    Example:
        >>> Energy()(torch.tensor([0.0, 0.0]), torch.tensor([2.0, 2.0]))
        tensor(2.)
    """

    name = "energy"
    formula = "D(X, Y)"
    meaning = "energy distance by which the {measurement}'s distribution moves"
    unit = "the square root of the {measurement}'s unit"
    signed = False
    moments = ("mean", "variance")

    def __call__(self, baseline: Tensor, predicted: Tensor) -> Tensor:
        """Return ``D(X, Y)``."""
        x, y = len(baseline), len(predicted)
        shape = torch.broadcast_shapes(baseline.shape[1:], predicted.shape[1:])
        values, order = torch.cat([baseline.expand(x, *shape), predicted.expand(y, *shape)]).sort(0)
        # F_X - F_Y is constant between neighbouring values; x y times it is counted exactly
        heights = torch.where(order < x, y, -x).cumsum(0)[:-1].to(values.dtype) / (x * y)
        return (2 * heights.square_().mul_(values.diff(dim=0)).sum(0)).sqrt()
