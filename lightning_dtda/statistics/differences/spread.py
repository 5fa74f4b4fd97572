"""Relative change of the standard deviation: does the measurement depend more, or less, on the seed?"""

from __future__ import annotations

from torch import Tensor

from lightning_dtda.statistics.differences.difference import Difference
from lightning_dtda.statistics.moments import log_spread_change, log_spread_error


class Spread(Difference):
    r"""Relative change of the standard deviation, :math:`\log \sigma_Y - \log \sigma_X`.

    A natural logarithm, without unit; tables and pages show :math:`\sigma_Y / \sigma_X - 1` in percent. Positive:
    removing the examples makes training less reproducible. It asks the same as :class:`Variance`, but as a ratio it
    does not depend on how well the runs determine :math:`\sigma_X`, so few runs are enough for an interval.

    Example:
        >>> import torch
        >>> x = torch.tensor([1.0, 2.0, 4.0])
        >>> Spread()(x, 0.5 * x + 7).exp()  # half the standard deviation
        tensor(0.5000)
    """

    name = "spread"
    formula = "SD Y / SD X \N{MINUS SIGN} 1"
    meaning = "change of the {measurement}'s standard deviation over runs"
    unit = "percent of the standard deviation"
    reading = (
        "Positive: without the {removed}, training depends more on the seed; the {removed} makes it more reproducible. "
        "Negative: the {removed} is one of those that make seeds disagree."
    )
    relative = True
    least_runs = 2
    moments = ("variance",)

    def __call__(self, baseline: Tensor, predicted: Tensor) -> Tensor:
        """Return ``log(sd Y / sd X)``, zero where neither has any spread."""
        return log_spread_change(baseline, predicted)

    def standard_error(self, baseline: Tensor, predicted: Tensor) -> Tensor:
        """Return the standard error (:func:`~lightning_dtda.statistics.moments.log_spread_error`)."""
        return log_spread_error(baseline, predicted)
