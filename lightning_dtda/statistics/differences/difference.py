"""Base class of the differences between two distributions of a measurement."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lightning_dtda.statistics.moments import Pairs
from lightning_dtda.statistics.resampling import bootstrap, jackknife
from lightning_dtda.statistics.significance import exchange_test, fewest_to_exchange
from lightning_dtda.statistics.signs import fewest_to_flip
from lightning_dtda.statistics.student import extended_to_zero, student_ends, student_p_values

Moment = Literal["mean", "variance"]

_MOST_RUNS = 10_000
"""Number of runs that nobody records."""

_SAID = ("name", "formula", "meaning", "unit")
"""Attributes with which every difference describes itself in tables, pages and W&B."""


class Inference(NamedTuple):
    """What samples of X and Y say about a difference.

    Args:
        estimate: The difference ``(...)``.
        standard_error: Its standard error over runs ``(...)``; NaN if there are too few.
        p_values: p-values of no difference ``(...)``; NaN if there are too few runs.
        interval: Lower and upper end ``(2, ...)``; NaN where there is none.
    """

    estimate: Tensor
    standard_error: Tensor
    p_values: Tensor
    interval: Tensor


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
        relative: Whether its value d is a logarithm, ``log(1 + formula)``. Tables and pages show ``exp(d) - 1``, the
            formula, in percent.
        moments: Moments whose change it reflects: ``"mean"``, ``"variance"`` or both. Its test is then that of these.
        smooth: Whether leaving one run out changes it little. If not, as for a median, its standard error comes from
            the bootstrap, and it has an interval only if :meth:`freedom` says so.
        paired: Whether it compares run by run, in which case X and Y must come from the same seeds.
        crossed: Whether it is for runs of which some share a seed (a crossed ensemble). The others take runs to be
            independent.
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
    relative: bool = False
    least_runs: int = 1
    moments: tuple[Moment, ...] = ()
    smooth: bool = True
    paired: bool = False
    crossed: bool = False
    joint: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if missing := [part for part in _SAID if not hasattr(cls, part)]:
            raise TypeError(f"{cls.__name__} is a Difference without {', '.join(missing)}. Set them in the class.")

    def of_runs(self, seeds: Mapping[str, Sequence[int]] | None) -> Difference:
        """Return the difference for runs with known seeds of each source; itself unless it depends on them."""
        return self

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

    def shown(self, value: float) -> float:
        """Return a value as tables and pages show it: in percent if it is ``relative``."""
        if not self.relative:
            return value
        try:
            return 100 * math.expm1(value)
        except OverflowError:  # the end of an interval where a single run makes most of the spread
            return math.inf

    def freedom(self, runs: int) -> float:
        """Return the degrees of freedom of Student's t with a number of runs; 0 if it is not by Student's t.

        By default ``runs - 1`` for smooth changes of a property.
        """
        return runs - 1 if self.signed and self.smooth else 0

    def standard_error(self, baseline: Tensor, predicted: Tensor) -> Tensor:
        """Return the standard error over runs ``(...)``, by the jackknife, or if not ``smooth`` by the bootstrap.

        Args:
            baseline: Samples of X ``(runs, ...)``.
            predicted: Samples of Y ``(runs, ...)``.
        """
        return (jackknife if self.smooth else bootstrap)(self, baseline, predicted)

    def p_values(self, baseline: Tensor, predicted: Tensor) -> Tensor:
        """Return the probability, over seeds, of a difference at least this clear if there is none.

        If it names moments, their tests (:func:`~lightning_dtda.statistics.moments.mean_test`,
        :func:`~lightning_dtda.statistics.moments.spread_test`); for both, twice the smaller p-value (Bonferroni).
        Otherwise Student's t, if there are degrees of :meth:`freedom`, and for the rest exchange
        (:func:`~lightning_dtda.statistics.significance.exchange_test`).

        Args:
            baseline: Samples of X, broadcastable against ``predicted`` ``(runs, ...)``.
            predicted: Samples of Y, from the same runs in the same order ``(runs, ...)``.

        Returns:
            p-values ``(...)``, float64; 1 where no run's measurement changes, NaN where the difference is NaN.
        """
        if self.moments:
            return Pairs(baseline, predicted).p_values(self.moments)
        if freedom := self.freedom(len(predicted)):
            return student_p_values(self(baseline, predicted), self.standard_error(baseline, predicted), freedom)
        return exchange_test(self, baseline, predicted)

    @property
    def least_runs_to_test(self) -> int:
        """Minimum number of runs for :meth:`p_values`: one more than for the difference, to leave one out."""
        return max(self.least_runs + 1, 3 if "variance" in self.moments else 2)

    def fewest_runs(self, level: float) -> float:
        """Return the minimum number of runs with which a p-value can be as small as a level, or infinity.

        Example:
            >>> from lightning_dtda.statistics import Mean, Spread
            >>> Mean().fewest_runs(0.001), Spread().fewest_runs(0.001)  # 2 ** -10 is below it
            (2, 11)
        """
        least = self.least_runs_to_test
        if self.moments:
            return least if "mean" in self.moments else max(least, fewest_to_flip(level))
        by_exchange = max(least, fewest_to_exchange(level))
        return next((runs for runs in range(least, _MOST_RUNS) if self.freedom(runs) or runs >= by_exchange), math.inf)

    def no_interval(self, runs: int) -> str:
        """Return why there is no :meth:`interval` with a number of runs, and what to do; an empty text if there is."""
        if runs < self.least_runs_to_test:
            return f"it needs {self.least_runs_to_test} runs; there are {runs}. Record more seeds."
        return "" if self.freedom(runs) else "no method is known to hold its level with few runs. Use the p-value."

    def interval(self, baseline: Tensor, predicted: Tensor, level: float) -> Tensor:
        """Return a confidence interval over runs, which excludes zero if and only if p is below ``1 - level``.

        It is that of :meth:`inference`, which subclasses with another interval override.

        Args:
            baseline: Samples of X ``(runs, ...)``.
            predicted: Samples of Y ``(runs, ...)``.
            level: Confidence level.

        Returns:
            Lower and upper end ``(2, ...)``; NaN where the difference is NaN, or if :meth:`no_interval` has a reason.
        """
        if self.no_interval(len(predicted)):
            estimate = self(baseline, predicted)
            return torch.full_like(estimate, torch.nan).expand(2, *estimate.shape)
        return self.inference(Pairs(baseline, predicted), level).interval

    def inference(self, pairs: Pairs, level: float) -> Inference:
        """Return the difference, its standard error, p-values and interval, each computed once.

        Args:
            pairs: Samples of X and Y. Of the same ones, several differences share the tests.
            level: Confidence level of the interval.
        """
        baseline, predicted = pairs.baseline, pairs.predicted
        runs, estimate = len(predicted), self(baseline, predicted)
        error, p = self.standard_error(baseline, predicted), torch.full_like(estimate, torch.nan)
        if runs >= self.least_runs_to_test:
            p = pairs.p_values(self.moments) if self.moments else self.p_values(baseline, predicted)
        if self.no_interval(runs):
            return Inference(estimate, error, p, torch.full_like(estimate, torch.nan).expand(2, *estimate.shape))
        ends = student_ends(estimate, error, self.freedom(runs), level)
        return Inference(estimate, error, p, extended_to_zero(ends, p, level))


def percent(share: float) -> str:
    """Format a share as a percentage.

    Example:
        >>> percent(0.1), percent(1 - 0.9)
        ('10 %', '10 %')
    """
    return f"{round(100 * share, 6):g} %"
