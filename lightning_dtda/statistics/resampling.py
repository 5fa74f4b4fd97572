"""Standard errors of a difference over seeds, by leaving runs out or resampling them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lightning_dtda.statistics.differences.difference import Difference


def jackknife(difference: Difference, baseline: Tensor, predicted: Tensor) -> Tensor:
    r"""Return the standard error of a difference over runs, by leaving each run out once.

    .. math::
        \widehat{se}^2 = \frac{S - 1}{S} \sum_s \left(\Delta_{(s)} - \bar\Delta_{(\cdot)}\right)^2

    (Efron and Tibshirani, *An Introduction to the Bootstrap*, 1993, chapter 11). X and Y of a run are left out together
    because they share a seed. For the mean, this is the usual standard error.

    Args:
        difference: The difference.
        baseline: Samples of X ``(runs, ...)``.
        predicted: Samples of Y ``(runs, ...)``.

    Returns:
        Standard error ``(...)``; NaN if there are too few runs to leave one out.

    Example:
        >>> from lightning_dtda.statistics import Mean
        >>> jackknife(Mean(), torch.zeros(4), torch.tensor([1.0, 2.0, 3.0, 4.0]))
        tensor(0.6455)
    """
    runs = len(predicted)
    if runs <= max(difference.least_runs, 1):
        return _unknown(difference, baseline, predicted)
    replicates = iter(difference.leave_one_out(baseline, predicted))
    first = next(replicates)
    return ((runs - 1) / runs * _squares_around_mean(chain([first], replicates), first)).clamp_min(0).sqrt()


def bootstrap(difference: Difference, baseline: Tensor, predicted: Tensor, replicates: int = 200) -> Tensor:
    """Return the standard error of a difference over runs, by drawing runs with replacement.

    (Efron and Tibshirani, *An Introduction to the Bootstrap*, 1993, chapter 6.) Used for differences that hardly change
    when one run is left out but change much when several are, such as a median. The draws are the same in every call.

    Args:
        difference: The difference.
        baseline: Samples of X ``(runs, ...)``.
        predicted: Samples of Y ``(runs, ...)``.
        replicates: Number of draws.

    Returns:
        Standard error ``(...)``; NaN if there are too few runs.
    """
    runs = len(predicted)
    if runs <= max(difference.least_runs, 1):
        return _unknown(difference, baseline, predicted)
    drawn = drawn_again(difference, baseline, predicted, replicates)
    return (_squares_around_mean(drawn, difference(baseline, predicted)) / (replicates - 1)).clamp_min(0).sqrt()


def drawn_again(difference: Difference, baseline: Tensor, predicted: Tensor, replicates: int) -> Iterator[Tensor]:
    """Yield the difference of runs drawn with replacement, X and Y of a run together.

    Args:
        difference: The difference.
        baseline: Samples of X ``(runs, ...)``.
        predicted: Samples of Y ``(runs, ...)``.
        replicates: Number of draws, which are the same in every call.
    """
    rows = positions(len(predicted), replicates, torch.Generator().manual_seed(0)).to(predicted.device)
    return (difference(baseline[some], predicted[some]) for some in rows)


def positions(number: int, replicates: int, generator: torch.Generator) -> Tensor:
    """Draw positions below ``number`` with replacement, ``number`` for each replicate ``(replicates, number)``."""
    return torch.randint(number, (replicates, number), generator=generator)


def _squares_around_mean(replicates: Iterable[Tensor], shift: Tensor) -> Tensor:
    """Sum the squared distances of replicates from their mean; ``shift``, near the mean, avoids cancellation.

    One replicate at a time, since each takes the memory of the responses.
    """
    number, total, squares = 0, torch.zeros_like(shift), torch.zeros_like(shift)
    for replicate in replicates:
        deviation = replicate - shift
        number += 1
        total += deviation
        squares += deviation.square()
    return squares - total.square() / number


def _unknown(difference: Difference, baseline: Tensor, predicted: Tensor) -> Tensor:
    rows = [0] * difference.least_runs  # its value does not matter, only its shape
    return torch.full_like(difference(baseline[rows], predicted[rows]), torch.nan)
