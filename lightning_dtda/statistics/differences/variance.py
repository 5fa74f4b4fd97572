"""Change of the variance: does the measurement depend more, or less, on the seed?"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_dtda.statistics.differences.difference import Difference
from lightning_dtda.statistics.moments import ROUNDING, variance


class Variance(Difference):
    r"""Change of the variance, :math:`\mathrm{Var}\, Y - \mathrm{Var}\, X`, unbiased (arXiv 2506.12965, section 3).

    In the square of the measurement's unit. Positive: removing the examples makes training less reproducible. It has
    the p-value of :class:`Spread`, since the hypothesis, Var X = Var Y, is the same. It has no interval: few runs say
    little about Var X, and so about the size of its change, even where they are sure of the sign.

    Example:
        >>> import torch
        >>> Variance()(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 4.0]))
        tensor(6.)
    """

    name = "variance"
    formula = "Var Y \N{MINUS SIGN} Var X"
    meaning = "change of the {measurement}'s variance over runs"
    unit = "the square of the {measurement}'s unit"
    reading = (
        "Positive: without the {removed}, training depends more on the seed; the {removed} makes it more reproducible. "
        "Negative: the {removed} is one of those that make seeds disagree."
    )
    least_runs = 2
    moments = ("variance",)

    def __call__(self, baseline: Tensor, predicted: Tensor) -> Tensor:
        """Return ``Var Y - Var X`` with divisor S - 1, zero where it is rounding."""
        of_x = variance(baseline)
        change = variance(predicted) - of_x
        return change.masked_fill(change.abs() <= ROUNDING * torch.finfo(change.dtype).eps * of_x, 0.0)

    def no_interval(self, runs: int) -> str:
        """Return why there is none: no method holds its level with few runs."""
        return "no method holds its level with few runs. Use the spread influence, whose interval does."

    def leave_one_out(self, baseline: Tensor, predicted: Tensor) -> Tensor:
        r"""Return the difference without each run ``(runs, ...)``, in the time of a single difference.

        With S runs, the variance without run s is
        :math:`\frac{(S - 1) \mathrm{Var}\, Y - \frac{S}{S - 1} d_s^2}{S - 2}`, where :math:`d_s` is the run's distance
        from the mean.
        """
        runs = len(predicted)
        squares = (predicted - predicted.mean(0)).square_() - (baseline - baseline.mean(0)).square()
        return (squares.sum(0) - squares.mul_(runs / (runs - 1))).div_(runs - 2)
