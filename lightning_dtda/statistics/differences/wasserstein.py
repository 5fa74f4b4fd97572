"""How far the measurement's distribution has to be carried."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_dtda.statistics.differences.difference import Difference


class Wasserstein(Difference):
    r"""2-Wasserstein distance between the empirical distributions of a one-dimensional measurement.

    :math:`W_2^2 = \frac1S \sum_i (x_{(i)} - y_{(i)})^2` with both samples sorted; where they are not of one size,
    :math:`W_2^2 = \int_0^1 (F_X^{-1}(u) - F_Y^{-1}(u))^2\,du`, which is the same (Villani, *Topics in Optimal
    Transportation*, 2003, theorem 2.18). In the measurement's unit, never negative, and zero only if nothing moved; so
    it is biased upwards where the effect is smaller than its standard error.

    Example:
        >>> Wasserstein()(torch.tensor([1.0, 3.0]), torch.tensor([4.0, 0.0]))
        tensor(1.)
    """

    name = "wasserstein"
    title = "Wasserstein influence"
    formula = "W₂(X, Y)"
    meaning = "Wasserstein distance by which the {measurement}'s distribution moves"
    unit = "the {measurement}'s unit"
    signed = False
    moments = ("mean", "variance")

    def __call__(self, baseline: Tensor, predicted: Tensor) -> Tensor:
        """Return ``W_2(X, Y)``."""
        x, y = baseline.sort(0).values, predicted.sort(0).values
        if len(x) == len(y):
            return (x - y).square().mean(0).sqrt()
        # where one of the quantile functions steps; counted in parts of 1 / (len(x) len(y)), which are exact
        steps = torch.cat([torch.arange(len(x)) * len(y), torch.arange(len(y)) * len(x)]).unique()
        lengths = steps.diff(append=torch.tensor([len(x) * len(y)])).to(x)
        x, y = x[(steps // len(y)).to(x.device)], y[(steps // len(x)).to(y.device)]
        return torch.tensordot(lengths / lengths.sum(), (x - y).square(), 1).sqrt()
