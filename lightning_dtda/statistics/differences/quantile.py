"""Whether good or bad seeds move."""

from __future__ import annotations

from torch import Tensor

from lightning_dtda.errors import AttributionError


class Quantile:
    r"""Change of a quantile, :math:`Q_p(Y) - Q_p(X)`.

    Between order statistics the quantile is linear (type 7 of Hyndman and Fan, *The American Statistician* 50, 1996).
    In the measurement's unit. Positive: removing the examples raises the quantile.
    A quantile rests on the two runs next to it; :class:`Tail` rests on more.

    Args:
        p: Which quantile, between 0 and 1.

    Raises:
        AttributionError: If p is not between 0 and 1.

    Example:
        >>> import torch
        >>> Quantile(0.5)(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([1.0, 1.5, 30.0]))
        tensor(-0.5000)
    """

    name = "quantile"
    least_runs = 1

    def __init__(self, p: float = 0.9) -> None:
        if not 0 <= p <= 1:
            raise AttributionError(f"p={p}; give a quantile between 0 and 1.")
        self.p = p

    def __call__(self, baseline: Tensor, predicted: Tensor) -> Tensor:
        """Return ``Q_p(Y) - Q_p(X)``."""
        return predicted.quantile(self.p, dim=0) - baseline.quantile(self.p, dim=0)
