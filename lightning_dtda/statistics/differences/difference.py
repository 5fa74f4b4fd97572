"""What a difference between two distributions of a measurement is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

Moment = Literal["mean", "variance"]

_SAID = ("name", "formula", "meaning", "unit")
"""What every difference says of itself: tables, pages and W&B show it."""


class Difference(ABC):
    """A difference between the distributions of X, as trained, and Y, with examples removed.

    A new one is a class of its own with a formula; whatever takes the name of a difference takes its import path too,
    and shows what it says of itself. In what it says, ``{measurement}`` stands for the measurement's name.

    Attributes:
        name: What columns and options call it.
        title: What a page calls it, as inside a sentence; without it the name.
        formula: Its definition by X and Y.
        meaning: What it is, such as ``"change of the mean {measurement}"``; "on this query if the example is removed"
            may follow, after a comma where it ends in one.
        unit: What it is measured in.
        reading: What its sign says, where that is more than up or down; here ``{removed}`` stands for what is removed.
        signed: Whether it is a change, :math:`p(Y) - p(X)` of a property, positive if removal raises it. Others are
            distances, which are never negative.
        least_runs: How many runs it needs.
        moments: Those whose change shows in it, ``"mean"``, ``"variance"`` or both: their test then is its test, see
            :mod:`~lightning_dtda.statistics.significance`. Without any it is tested by exchange.
        smooth: Whether it changes a little when one run is left out. If not, as a median does, its standard error is by
            the bootstrap.
        paired: Whether it compares run by run, so that X and Y must be of the same seeds.
        joint: Whether it is between joint distributions of several measurements, which lie along the second dimension
            ``(runs, measurements, ...)``; see :meth:`Attribution.joint_influence
            <lightning_dtda.Attribution.joint_influence>`.

    Raises:
        TypeError: If a class lacks name, formula, meaning or unit.

    Example:
        >>> class Range(Difference):
        ...     name, formula, unit = "range", "range Y - range X", "the {measurement}'s unit"
        ...     meaning = "change of the distance between the best and the worst {measurement}"
        ...
        ...     def __call__(self, baseline, predicted):
        ...         return (predicted.amax(0) - predicted.amin(0)) - (baseline.amax(0) - baseline.amin(0))
        >>> Range()(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 4.0]))
        tensor(2.)
    """

    name: str
    title: str = ""
    formula: str
    meaning: str
    unit: str
    reading: str = ""
    signed: bool = True
    least_runs: int = 1
    moments: tuple[Moment, ...] = ()
    smooth: bool = True
    paired: bool = False
    joint: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if missing := [part for part in _SAID if not hasattr(cls, part)]:
            raise TypeError(f"{cls.__name__} is a Difference without {', '.join(missing)}. Set them in the class.")

    @abstractmethod
    def __call__(self, baseline: Tensor, predicted: Tensor) -> Tensor:
        """Compute the difference along the first dimension.

        Args:
            baseline: Samples of X, broadcastable against ``predicted`` ``(runs, ...)``.
            predicted: Samples of Y, from the same runs in the same order ``(runs, ...)``. Ground truth may have other
                numbers of X and Y, but for differences that are ``paired``.

        Returns:
            ``(...)``.
        """

    def leave_one_out(self, baseline: Tensor, predicted: Tensor) -> Iterable[Tensor]:
        """Give the difference without each run ``(...)``, in order; a class may have a formula that is faster.

        Args:
            baseline: Samples of X ``(runs, ...)``.
            predicted: Samples of Y ``(runs, ...)``.
        """
        keep = ~torch.eye(len(predicted), dtype=torch.bool, device=predicted.device)
        return (self(baseline[rows], predicted[rows]) for rows in keep)


def percent(share: float) -> str:
    """Return a share in words.

    Example:
        >>> percent(0.1), percent(1 - 0.9)
        ('10 %', '10 %')
    """
    return f"{round(100 * share, 6):g} %"
