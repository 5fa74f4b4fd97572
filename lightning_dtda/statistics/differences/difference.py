"""Base class of the differences between two distributions of a measurement."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

Moment = Literal["mean", "variance"]

_SAID = ("name", "formula", "meaning", "unit")
"""Attributes with which every difference describes itself in tables, pages and W&B."""


class Difference(ABC):
    """A difference between the distributions of X, as trained, and Y, with examples removed.

    To add one, write a subclass. Its import path works wherever the name of a difference does, and its description is
    shown in results. In the description, ``{measurement}`` stands for the measurement's name.

    Attributes:
        name: Name in columns and options.
        title: Name within a sentence on a page; ``name`` if empty.
        formula: Definition in terms of X and Y.
        meaning: Meaning, such as ``"change of the mean {measurement}"``. "on this query if the example is removed" may
            follow it, after a comma if ``meaning`` ends in one.
        unit: Unit of the difference.
        reading: Meaning of the sign, where that is more than up or down; ``{removed}`` stands for what is removed.
        signed: Whether it is a change :math:`p(Y) - p(X)` of a property, positive if removal raises it. Other
            differences are distances, which are never negative.
        least_runs: Minimum number of runs.
        moments: Moments whose change it reflects: ``"mean"``, ``"variance"`` or both. Their tests are then its test,
            see :mod:`~lightning_dtda.statistics.significance`. Without any, it is tested by exchange.
        smooth: Whether leaving one run out changes it little. If not, as for a median, its standard error comes from
            the bootstrap.
        paired: Whether it compares run by run, in which case X and Y must come from the same seeds.
        joint: Whether it compares joint distributions of several measurements, which lie along the second dimension
            ``(runs, measurements, ...)``; see :meth:`Attribution.joint_influence
            <lightning_dtda.Attribution.joint_influence>`.

    Raises:
        TypeError: If a subclass lacks a name, formula, meaning or unit.

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
            predicted: Samples of Y, from the same runs in the same order ``(runs, ...)``. In ground truth, the numbers
                of samples of X and Y may differ unless the difference is ``paired``.

        Returns:
            Difference ``(...)``.
        """

    def leave_one_out(self, baseline: Tensor, predicted: Tensor) -> Iterable[Tensor]:
        """Yield the difference without each run ``(...)``, in order; subclasses may override it with a faster formula.

        Args:
            baseline: Samples of X ``(runs, ...)``.
            predicted: Samples of Y ``(runs, ...)``.
        """
        keep = ~torch.eye(len(predicted), dtype=torch.bool, device=predicted.device)
        return (self(baseline[rows], predicted[rows]) for rows in keep)


def percent(share: float) -> str:
    """Format a share as a percentage.

    Example:
        >>> percent(0.1), percent(1 - 0.9)
        ('10 %', '10 %')
    """
    return f"{round(100 * share, 6):g} %"
