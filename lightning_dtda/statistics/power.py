"""Number of retrainings, or of recorded runs, needed to show an effect."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_dtda.statistics.differences import Difference

_DRAWS = 400
"""Number of simulated pairs of samples per number of seeds: the power is then known to 0.02."""

_MOST = 4096
"""Number of seeds beyond which the simulated search gives up; nobody retrains that often."""


def retrainings_needed(
    difference: Difference, baseline: Tensor, predicted: Tensor, power: float, alpha: float
) -> Tensor:
    r"""Return the number of retrainings with, and equally without, the examples that would show the difference.

    Both samples come from fresh seeds, independent of each other, with n retrainings each. To find the predicted effect
    with the given power, a two-sided test at :math:`\alpha` needs

    - for the mean, by Welch's t-test, :math:`n = (z_{1-\alpha/2} + z_{power})^2 (\sigma_X^2 + \sigma_Y^2) / \delta^2 +
      z_{1-\alpha/2}^2 (\sigma_X^4 + \sigma_Y^4) / 2 (\sigma_X^2 + \sigma_Y^2)^2`, where the last term accounts for
      estimating the variances (Schouten, *Statistics in Medicine* 18, 1999);
    - for the variance, by the F-test on Gaussian samples, :math:`n = 1 + 4 (z_{1-\alpha/2} + z_{power})^2 /
      \log^2(\sigma_Y^2 / \sigma_X^2)`, since the logarithm of a sample variance has variance :math:`2 / (n - 1)`;
    - for others, the smallest n at which enough pairs of samples drawn from X and from Y differ by more than a share of
      :math:`1 - \alpha` of the pairs drawn from X and Y pooled; this is simulated.

    Args:
        difference: The difference.
        baseline: Samples of X ``(runs, ...)``.
        predicted: Samples of Y ``(runs, ...)``.
        power: Probability of finding the effect.
        alpha: Probability of finding an effect that does not exist.

    Returns:
        Number of retrainings ``(...)``, float64; infinite where there is no effect, or where the simulated search
        exceeds 4096.

    Example:
        >>> from lightning_dtda.statistics import Mean
        >>> x = torch.tensor([-1.0, 0.0, 1.0])
        >>> retrainings_needed(Mean(), x, x + 1, power=0.8, alpha=0.05)  # effect of one standard deviation
        tensor(17., dtype=torch.float64)
    """
    z = torch.special.ndtri(torch.tensor([1 - alpha / 2, power], dtype=torch.float64))
    squared = float(z.sum().square())
    if difference.moments == ("mean",):
        of_x, of_y, shift = baseline.var(0), predicted.var(0), predicted.mean(0) - baseline.mean(0)
        both = of_x + of_y
        estimated = float(z[0].square()) / 2 * (of_x.square() + of_y.square()) / both.square()
        needed = squared * both / shift.square() + estimated.nan_to_num(0)
    elif difference.moments == ("variance",):
        needed = 1 + 4 * squared / (predicted.var(0) / baseline.var(0)).log().square()
    else:
        return _simulated(difference, baseline.expand_as(predicted), predicted, power, alpha)
    return needed.double().ceil().clamp_min(2).nan_to_num(torch.inf, torch.inf)


def runs_for_significance(difference: Difference, p: Tensor, runs: int, level: float, power: float) -> Tensor:
    r"""Return the total number of runs with which the test of an effect would give a p-value below a level.

    A test statistic grows with the square root of the number of runs S. On the scale of a standard Gaussian, it is now
    :math:`z_{1-p/2}`. If the effect is as large as it seems,

    .. math:: n = S \left(\frac{z_{1-level/2} + z_{power}}{z_{1-p/2}}\right)^2

    runs give a p-value below the level with the given power. The result is at least the number of runs with which the
    test can reach the level at all, see :meth:`Difference.fewest_runs
    <lightning_dtda.statistics.Difference.fewest_runs>`.

    Args:
        difference: The difference.
        p: p-values of its test ``(...)``.
        runs: Number of runs that gave them, S.
        level: Level that the p-value must be below.
        power: Probability that it is.

    Returns:
        Number of runs ``(...)``, float64; infinite where there is no effect, or where no number of runs is enough.

    Example:
        >>> from lightning_dtda.statistics import Mean
        >>> runs_for_significance(Mean(), torch.tensor([0.05]), runs=20, level=0.05, power=0.5)  # as likely as not
        tensor([20.], dtype=torch.float64)
    """
    wanted = float(torch.special.ndtri(torch.tensor([1 - level / 2, power], dtype=torch.float64)).sum())
    needed = runs * (wanted / torch.special.ndtri(p.double() / 2)).square()
    return needed.round(decimals=6).ceil().clamp_min(difference.fewest_runs(level)).nan_to_num(torch.inf, torch.inf)


def _simulated(difference: Difference, baseline: Tensor, predicted: Tensor, power: float, alpha: float) -> Tensor:
    columns = zip(baseline.reshape(len(baseline), -1).T, predicted.reshape(len(predicted), -1).T, strict=True)
    needed = [_fewest(difference, x, y, power, alpha) for x, y in columns]
    return torch.tensor(needed, dtype=torch.float64, device=predicted.device).reshape(predicted.shape[1:])


def _fewest(difference: Difference, x: Tensor, y: Tensor, power: float, alpha: float) -> float:
    if torch.equal(x, y):
        return math.inf
    too_few, enough = 0, max(2, difference.least_runs)
    while not _shows(difference, x, y, enough, power, alpha):
        too_few, enough = enough, 2 * enough
        if enough > _MOST:
            return math.inf
    while enough - too_few > 1 and enough > max(2, difference.least_runs):
        middle = (too_few + enough) // 2
        if _shows(difference, x, y, middle, power, alpha):
            enough = middle
        else:
            too_few = middle
    return enough


def _shows(difference: Difference, x: Tensor, y: Tensor, seeds: int, power: float, alpha: float) -> bool:
    generator = torch.Generator().manual_seed(0)

    def draw(samples: Tensor) -> Tensor:
        rows = torch.randint(len(samples), (seeds, _DRAWS), generator=generator)
        return samples[rows.to(samples.device)]

    both = torch.cat([x, y])
    limit = difference(draw(both), draw(both)).abs().quantile(1 - alpha)
    return bool((difference(draw(x), draw(y)).abs() > limit).double().mean() >= power)
