"""Whether the measurement moves."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from lightning_dtda.errors import AttributionError
from lightning_dtda.statistics.differences.difference import Moment

Location = Literal["mean", "median", "trimmed"]


class Mean:
    r"""Difference of the means, :math:`E X - E Y` (arXiv 2506.12965, definition 1).

    In the measurement's unit. Positive: the examples raise the measurement, and removing them lowers it.

    Args:
        location: How the shifts of the runs are summed up: their ``"mean"``; their ``"median"``; or the mean without
            the largest and the smallest fifth, ``"trimmed"`` (Wilcox, *Introduction to Robust Estimation and Hypothesis
            Testing*, 2012, section 3.3). The last two bear with a few runs that are far off.

    Raises:
        AttributionError: If the location is none of these.

    Example:
        >>> import torch
        >>> Mean()(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 2.0]))
        tensor(1.)
        >>> Mean("median")(torch.zeros(3), torch.tensor([-1.0, -2.0, 90.0]))
        tensor(1.)
    """

    name = "mean"
    least_runs = 1

    def __init__(self, location: Location = "mean") -> None:
        if location not in get_args(Location):
            raise AttributionError(f"location={location!r}; choose from {', '.join(get_args(Location))}.")
        self.location = location
        self.moments: tuple[Moment, ...] = ("mean",) if location == "mean" else ()

    def __call__(self, baseline: Tensor, predicted: Tensor) -> Tensor:
        """Return ``E X - E Y``, or the location of ``X - Y`` over runs."""
        if self.location == "mean":
            return baseline.mean(0) - predicted.mean(0)
        falls = baseline - predicted
        if self.location == "median":
            return falls.quantile(0.5, dim=0)
        cut = len(falls) // 5
        return falls.sort(0).values[cut : len(falls) - cut].mean(0)
