"""Differences between two distributions of a measurement, each given by samples."""

from __future__ import annotations

import importlib
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from lightning_dtda.errors import AttributionError

Location = Literal["mean", "median", "trimmed"]


class Difference(Protocol):
    """A difference between the distributions of X, as trained, and Y, with examples removed.

    A new difference is one class with these members; it is found by its import path.
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

    def __call__(self, baseline: Tensor, predicted: Tensor) -> Tensor:
        """Return ``E X - E Y``, or the location of ``X - Y`` over runs."""
        if self.location == "mean":
            return baseline.mean(0) - predicted.mean(0)
        falls = baseline - predicted
        if self.location == "median":
            return falls.quantile(0.5, dim=0)
        cut = len(falls) // 5
        return falls.sort(0).values[cut : len(falls) - cut].mean(0)


class Variance:
    r"""Change of the variance, :math:`\mathrm{Var}\, Y - \mathrm{Var}\, X`, unbiased (arXiv 2506.12965, section 3).

    In the square of the measurement's unit. Positive: removing the examples makes training less reproducible.

    Example:
        >>> Variance()(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 4.0]))
        tensor(6.)
    """

    name = "variance"
    least_runs = 2

    def __call__(self, baseline: Tensor, predicted: Tensor) -> Tensor:
        """Return ``Var Y - Var X`` with divisor S - 1."""
        return predicted.var(0) - baseline.var(0)


class Wasserstein:
    r"""2-Wasserstein distance between the empirical distributions of a one-dimensional measurement.

    :math:`W_2^2 = \frac1S \sum_i (x_{(i)} - y_{(i)})^2` with both samples sorted; where they are not of one size,
    :math:`W_2^2 = \int_0^1 (F_X^{-1}(u) - F_Y^{-1}(u))^2\,du`, which is the same (Villani, *Topics in Optimal
    Transportation*, 2003, theorem 2.18). In the measurement's unit, never negative, and zero only if nothing moved; so
    it is biased upwards where the effect is smaller than its standard error.

    Example:
        >>> Wasserstein()(torch.tensor([1.0, 3.0]), torch.tensor([4.0, 0.0]))
        tensor(1.)
    """

    name = "wasserstein"
    least_runs = 1

    def __call__(self, baseline: Tensor, predicted: Tensor) -> Tensor:
        """Return ``W_2(X, Y)``."""
        x, y = baseline.sort(0).values, predicted.sort(0).values
        if len(x) == len(y):
            return (x - y).square().mean(0).sqrt()
        # where one of the quantile functions steps; counted in parts of 1 / (len(x) len(y)), which are exact
        steps = torch.cat([torch.arange(len(x)) * len(y), torch.arange(len(y)) * len(x)]).unique()
        lengths = steps.diff(append=torch.tensor([len(x) * len(y)])).to(x)
        x, y = x[(steps // len(y)).to(x.device)], y[(steps // len(x)).to(y.device)]
        return torch.tensordot(lengths / lengths.sum(), (x - y).square(), 1).sqrt()


DIFFERENCES: dict[str, Difference] = {difference.name: difference for difference in (Mean(), Variance(), Wasserstein())}


def resolve_difference(difference: str | Difference) -> Difference:
    """Return the difference of a name or of a class's import path.

    Raises:
        AttributionError: If the name stands for nothing.

    Example:
        >>> resolve_difference("variance").name
        'variance'
    """
    if not isinstance(difference, str):
        return difference
    if difference in DIFFERENCES:
        return DIFFERENCES[difference]
    module, _, attribute = difference.rpartition(".")
    try:
        found: Difference | None = getattr(importlib.import_module(module), attribute)() if module else None
    except (ImportError, AttributeError):
        found = None
    if found is None:
        raise AttributionError(
            f"{difference!r} is no difference. Choose from {', '.join(DIFFERENCES)}, or give the import path of a "
            "class like lightning_dtda.attribution.differences.Mean."
        )
    return found


def jackknife(difference: Difference, baseline: Tensor, predicted: Tensor) -> Tensor:
    r"""Standard error of a difference over runs, by leaving each run out once.

    .. math::
        \widehat{se}^2 = \frac{S - 1}{S} \sum_s \left(\Delta_{(s)} - \bar\Delta_{(\cdot)}\right)^2

    (Efron and Tibshirani, *An Introduction to the Bootstrap*, 1993, chapter 11). X and Y of a run leave together:
    they are of one seed. For the mean this is the usual standard error.

    Args:
        difference: The difference.
        baseline: Samples of X ``(runs, ...)``.
        predicted: Samples of Y ``(runs, ...)``.

    Returns:
        ``(...)``; NaN where there is one run too few to leave one out.

    Example:
        >>> jackknife(Mean(), torch.zeros(4), torch.tensor([1.0, 2.0, 3.0, 4.0]))
        tensor(0.6455)
    """
    runs = len(predicted)
    if runs <= max(difference.least_runs, 1):
        return torch.full_like(predicted[0], torch.nan)
    keep = ~torch.eye(runs, dtype=torch.bool, device=predicted.device)
    # the first two moments, run by run: all replicates at once would take S times the memory of the responses
    replicates = (difference(baseline[rows], predicted[rows]) for rows in keep)
    total = next(replicates)
    shift, squares = total.clone(), torch.zeros_like(total)
    total = torch.zeros_like(total)
    for replicate in replicates:
        total += replicate - shift
        squares += (replicate - shift).square()
    return ((runs - 1) / runs * (squares - total.square() / runs)).clamp_min(0).sqrt()


def bootstrap(difference: Difference, baseline: Tensor, predicted: Tensor, replicates: int = 200) -> Tensor:
    """Standard error of a difference over runs, by drawing runs with replacement.

    (Efron and Tibshirani, *An Introduction to the Bootstrap*, 1993, chapter 6.) For differences that hardly change when
    one run is left out and much when several are, such as a median. The draws are always the same ones.

    Args:
        difference: The difference.
        baseline: Samples of X ``(runs, ...)``.
        predicted: Samples of Y ``(runs, ...)``.
        replicates: Number of draws.

    Returns:
        ``(...)``; NaN for a single run.
    """
    runs = len(predicted)
    if runs <= max(difference.least_runs, 1):
        return torch.full_like(predicted[0], torch.nan)
    generator = torch.Generator().manual_seed(0)
    total, squares = torch.zeros_like(predicted[0]), torch.zeros_like(predicted[0])
    shift = difference(baseline, predicted)
    for _ in range(replicates):
        rows = torch.randint(runs, (runs,), generator=generator).to(predicted.device)
        deviation = difference(baseline[rows], predicted[rows]) - shift
        total += deviation
        squares += deviation.square()
    return ((squares - total.square() / replicates) / (replicates - 1)).clamp_min(0).sqrt()
