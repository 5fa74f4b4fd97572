"""Change of a quantile: do good or bad seeds move?"""

from __future__ import annotations

import math

from torch import Tensor

from lightning_dtda.errors import AttributionError
from lightning_dtda.statistics.differences.difference import Difference, percent

DEFAULT = 0.9
"""Quantile that the name ``quantile`` stands for: bad seeds, but not so rare that few runs contain none."""


_FEWEST = 2 - 1e-9
"""Number of runs beyond a quantile for an interval that holds its level, up to rounding."""


class Quantile(Difference):
    r"""Change of a quantile, :math:`Q_p(Y) - Q_p(X)`.

    The quantile is interpolated linearly between order statistics (type 7 of Hyndman and Fan, *The American
    Statistician* 50, 1996). In the measurement's unit. Positive: removing the examples raises the quantile.
    A quantile depends only on the two runs next to it; :class:`Tail` uses more runs.

    Args:
        p: Probability of the quantile, between 0 and 1.

    Raises:
        AttributionError: If p is not between 0 and 1.

    Example:
        >>> import torch
        >>> Quantile(0.5)(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([1.0, 1.5, 30.0]))
        tensor(-0.5000)
    """

    name = "quantile"
    formula = "Q(Y) \N{MINUS SIGN} Q(X)"
    meaning = "change of a quantile of the {measurement}"
    unit = "the {measurement}'s unit"
    smooth = False

    def __init__(self, p: float = DEFAULT) -> None:
        if not 0 <= p <= 1:
            raise AttributionError(f"p={p}; give a quantile between 0 and 1.")
        self.p = p
        share = percent(p)
        if p != DEFAULT:
            self.name = f"quantile({p:g})"
        self.title = f"influence on the {share} quantile"
        self.meaning = f"change of the {{measurement}} that {share} of the runs do not exceed,"

    def freedom(self, runs: int) -> float:
        """Return the degrees of freedom of Student's t, twice the number of runs beyond the quantile.

        With fewer than two runs beyond it, it has no interval, and is tested by exchange.
        """
        beyond = runs * min(self.p, 1 - self.p)
        return min(runs - 1, 2 * beyond) if beyond > _FEWEST else 0

    def no_interval(self, runs: int) -> str:
        """Return why there is no interval with a number of runs, or an empty text."""
        if self.freedom(runs):
            return ""
        if self.p in (0, 1):
            return "no method holds its level at the ends of a distribution. Use the p-value."
        needed = math.ceil(_FEWEST / min(self.p, 1 - self.p))
        return (
            f"it needs {needed} runs, two beyond the quantile; there are {runs}. Record more seeds, or use the p-value."
        )

    def __call__(self, baseline: Tensor, predicted: Tensor) -> Tensor:
        """Return ``Q_p(Y) - Q_p(X)``."""
        return predicted.quantile(self.p, dim=0) - baseline.quantile(self.p, dim=0)
