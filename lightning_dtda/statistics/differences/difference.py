"""What a difference between two distributions of a measurement is."""

from __future__ import annotations

from typing import Literal, Protocol

from torch import Tensor

Moment = Literal["mean", "variance"]


class Difference(Protocol):
    """A difference between the distributions of X, as trained, and Y, with examples removed.

    A new difference is one class with these members; it is found by its import path. It may have ``moments`` too, those
    whose change shows in it, ``"mean"``, ``"variance"`` or both: their test then is its test of significance, see
    :mod:`~lightning_dtda.statistics.significance`. It may have ``leave_one_out``, of the same arguments, which returns
    the difference without each run ``(runs, ...)``: where there is a formula, standard errors take it.
    """

    name: str
    least_runs: int

    def __call__(self, baseline: Tensor, predicted: Tensor) -> Tensor:
        """Compute the difference along the first dimension.

        Args:
            baseline: Samples of X, broadcastable against ``predicted`` ``(runs, ...)``.
            predicted: Samples of Y, from the same runs in the same order ``(runs, ...)``.

        Returns:
            ``(...)``.
        """
        ...
