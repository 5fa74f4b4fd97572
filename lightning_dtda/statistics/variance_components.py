"""Variance of crossed samples, split by the sources that vary: random effects."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from scipy import special, stats
from torch import Tensor

from lightning_dtda.errors import AttributionError

REST = "rest"
"""Name of the part that is left: what all sources decide together, and what has a seed of its own in each run."""

_DRAWS = 2000
"""Number of draws behind an interval; with others, its ends change by less than 1 % of its length."""

_AT_ONCE = 256
"""Number of queries whose intervals are drawn at once: 30 MB for three parts."""


@dataclass(frozen=True, eq=False)
class Crossed:
    r"""Runs that combine each seed of several sources with each seed of the others.

    A sample is a sum of independent effects, one for each set of sources,

    .. math:: y_{ij} = \mu + a_i + b_j + e_{ij}

    for two sources, where the *rest* :math:`e` is their interaction and everything that has a seed of its own in each
    run; for three, with :math:`(ab)_{ij}, (ac)_{ik}, (bc)_{jk}` as well. The variance of a sample is the sum of the
    effects' variances, the *components*.

    Args:
        sources: Names of the sources with at least two seeds.
        shape: Number of seeds of each source.
        runs: Positions of the runs, the last source varying fastest ``(runs,)``.
    """

    sources: tuple[str, ...]
    shape: tuple[int, ...]
    runs: Tensor

    @classmethod
    def of(cls, seeds: Mapping[str, Sequence[int]]) -> Crossed:
        """Find the largest complete grid in runs with given seeds: seeds with missing runs are left out.

        Args:
            seeds: Seed of each source in each run.

        Raises:
            AttributionError: If fewer than two sources have several seeds, or no two seeds of two sources are combined.

        Example:
            >>> Crossed.of({"initialisation": [0, 1, 0, 1, 0], "order": [0, 0, 1, 1, 2]})
            ... # doctest: +NORMALIZE_WHITESPACE
            Crossed(sources=('initialisation', 'order'), shape=(2, 2), runs=tensor([0, 2, 1, 3]))
        """
        places: dict[tuple[int, ...], int] = {}
        for run, combined in enumerate(zip(*seeds.values(), strict=True)):
            places.setdefault(combined, run)
        levels = [sorted(set(of_source)) for of_source in seeds.values()]
        while levels and (missing := set(itertools.product(*levels)) - places.keys()):
            # the seed most of whose runs are missing
            shares = [
                (sum(cell[axis] == seed for cell in missing) / math.prod(map(len, levels)) * len(of_axis), axis, seed)
                for axis, of_axis in enumerate(levels)
                for seed in of_axis
            ]
            _, axis, seed = max(shares)
            levels[axis].remove(seed)
        varied = [number for number, of_source in enumerate(levels) if len(of_source) > 1]
        if len(varied) < 2:
            raise AttributionError(
                "The variance can be split by source only if at least two sources have several seeds, each combined "
                "with each. Record them so: record(..., seeds=CrossedSeeds(initialisation=8, order=8)), on the command "
                "line --seeds.initialisation 8 --seeds.order 8."
            )
        names = list(seeds)
        return cls(
            tuple(names[number] for number in varied),
            tuple(len(levels[number]) for number in varied),
            torch.tensor([places[cell] for cell in itertools.product(*levels)]),
        )

    @cached_property
    def effects(self) -> tuple[tuple[int, ...], ...]:
        """Set of sources of each effect, as positions in ``sources``; the last one, of all, is the rest."""
        axes = range(len(self.sources))
        return tuple(each for size in range(1, len(axes) + 1) for each in itertools.combinations(axes, size))

    @property
    def parts(self) -> tuple[str, ...]:
        """Name of each effect, such as ``"initialisation"``, ``"initialisation and order"``, ``"rest"``."""
        named = [" and ".join(self.sources[axis] for axis in effect) for effect in self.effects]
        return (*named[:-1], REST)

    @cached_property
    def freedom(self) -> tuple[int, ...]:
        """Degrees of freedom of each effect's mean square."""
        return tuple(math.prod(self.shape[axis] - 1 for axis in effect) for effect in self.effects)

    @cached_property
    def repeats(self) -> tuple[int, ...]:
        """Number of runs in which each value of an effect appears."""
        return tuple(len(self.runs) // math.prod(self.shape[axis] for axis in effect) for effect in self.effects)

    def deviations(self, samples: Tensor) -> list[Tensor]:
        """Return the estimated values of each effect, shaped like the grid ``(*shape or 1, ...)``.

        Args:
            samples: Samples ``(runs, ...)``.
        """
        left = samples[self.runs.to(samples.device)].reshape(*self.shape, *samples.shape[1:])
        axes = range(len(self.sources))
        left = left - left.mean(tuple(axes), keepdim=True)
        found = []
        for effect in self.effects:
            others = [axis for axis in axes if axis not in effect]
            of_effect = left.mean(others, keepdim=True) if others else left
            found.append(of_effect)
            left = left - of_effect
        return found

    def mean_products(self, first: list[Tensor], second: list[Tensor]) -> list[Tensor]:
        """Return the mean product of two samples' :meth:`deviations` for each effect ``(...)``; of one, mean squares.

        The expected mean square of an effect is the sum of its component and those of the effects that refine it, each
        times the number of runs in which its values repeat.
        """
        axes = tuple(range(len(self.sources)))
        return [
            repeats * (one * other).sum(axes) / freedom
            for one, other, repeats, freedom in zip(first, second, self.repeats, self.freedom, strict=True)
        ]

    def weights(self, effect: int) -> list[tuple[int, float]]:
        """Return the effects whose mean squares make up a component, each with its weight."""
        own = set(self.effects[effect])
        return [
            (number, (-1) ** (len(other) - len(own)) / self.repeats[effect])
            for number, other in enumerate(self.effects)
            if own <= set(other)
        ]

    def components(self, squares: Sequence[Tensor]) -> Tensor:
        """Return the unbiased components from mean squares ``(effects, ...)``; they may be negative."""
        return torch.stack(
            [sum(weight * squares[n] for n, weight in self.weights(number)) for number in range(len(self.effects))]  # type: ignore[misc]
        )


def components(crossed: Crossed, samples: Tensor) -> Tensor:
    r"""Return the unbiased variance components of samples ``(parts, ...)``, by the analysis of variance.

    For two sources with I and J seeds and mean squares :math:`M_a, M_b, M_e`,

    .. math:: \hat\sigma_a^2 = \frac{M_a - M_e}{J}, \qquad \hat\sigma_b^2 = \frac{M_b - M_e}{I}, \qquad
        \hat\sigma_e^2 = M_e

    (Searle, Casella and McCulloch, *Variance Components*, 1992, section 4.3). A small component may come out negative.

    Args:
        crossed: The crossed runs.
        samples: Samples ``(runs, ...)``.

    Example:
        >>> crossed = Crossed.of({"initialisation": [0, 0, 1, 1], "order": [0, 1, 0, 1]})
        >>> components(crossed, torch.tensor([0.0, 1.0, 4.0, 5.0], dtype=torch.float64))
        tensor([8.0000, 0.5000, 0.0000], dtype=torch.float64)
    """
    deviations = crossed.deviations(samples.double())
    return crossed.components(crossed.mean_products(deviations, deviations))


def component_intervals(crossed: Crossed, samples: Tensor, level: float = 0.95) -> Tensor:
    r"""Return confidence intervals of the variance components ``(2, parts, ...)``.

    Generalised confidence intervals (Weerahandi, *Journal of the American Statistical Association* 88, 1993): quantiles
    of the component with each mean square M replaced by :math:`\nu M / \chi^2_\nu`, at least zero. Effects with heavy
    tails have fewer degrees of freedom than their number of values says,

    .. math:: \nu = \min\left(\nu_0,\; \frac{2 \nu_0}{\hat\gamma - (n - 3) / n}\right),

    with the kurtosis :math:`\hat\gamma` of their n values about the median (after Bonett, *Computational Statistics and
    Data Analysis* 50, 2006). In simulations, 95 % intervals covered 96 to 99 % for Gaussian effects, 91 to 99 % for
    Student's t with 5 degrees of freedom, and 87 to 99 % for exponential effects
    (``benchmarks/variance_by_source.py``).

    Args:
        crossed: The crossed runs.
        samples: Samples ``(runs, queries)``.
        level: Confidence level.
    """
    if samples.ndim > 1 and samples.shape[1] > _AT_ONCE:  # in parts, to save memory
        parts = samples.split(_AT_ONCE, 1)
        return torch.cat([component_intervals(crossed, part, level) for part in parts], 2)
    deviations = crossed.deviations(samples.double())
    squares = crossed.mean_products(deviations, deviations)
    generator = np.random.default_rng(0)
    even = (np.arange(_DRAWS) + 0.5) / _DRAWS
    replaced = []
    for of_effect, square, freedom in zip(deviations, squares, crossed.freedom, strict=True):
        # strata, in an order of its own for each effect
        drawn = generator.permutation(even)
        degrees = _effective(of_effect.flatten(0, len(crossed.shape) - 1), freedom)[..., None]
        chi = torch.as_tensor(special.chdtri(degrees.cpu().numpy(), 1 - drawn), device=square.device)
        replaced.append(square[..., None] * degrees / chi)
    quantiles = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64, device=samples.device)
    return crossed.components(replaced).quantile(quantiles, dim=-1).clamp_min(0)


def mean_variance(crossed: Crossed, samples: Tensor, seeds: Mapping[str, Sequence[int]]) -> Tensor:
    r"""Return the variance of the mean over all runs ``(...)``, whether or not they are in the complete grid.

    The sum of the components, where negative ones count as zero, each times the squared shares of the runs that have
    the same value of its effect. For a complete grid of I and J seeds,

    .. math:: \hat V = \frac{\hat\sigma_a^2}{I} + \frac{\hat\sigma_b^2}{J} + \frac{\hat\sigma_e^2}{I J}

    Args:
        crossed: The complete grid, from which the components are estimated.
        samples: Samples ``(runs, ...)``.
        seeds: Seed of each source in each run.

    Example:
        >>> seeds = {"initialisation": [0, 0, 1, 1], "order": [0, 1, 0, 1]}
        >>> samples = torch.tensor([0.0, 1.0, 4.0, 5.0], dtype=torch.float64)
        >>> mean_variance(Crossed.of(seeds), samples, seeds)  # 8 / 2 + 0.5 / 2 + 0 / 4
        tensor(4.2500, dtype=torch.float64)
    """
    found = components(crossed, samples).clamp_min(0)
    variance = torch.zeros_like(found[0])
    for component, effect in zip(found, crossed.effects, strict=True):
        counts = Counter(zip(*(seeds[crossed.sources[axis]] for axis in effect), strict=True))
        variance = variance + component * (sum(count**2 for count in counts.values()) / len(samples) ** 2)
    return variance


def _effective(values: Tensor, freedom: int) -> Tensor:
    """Return the degrees of freedom of the mean square of an effect's values ``(values, ...)``."""
    number = len(values)
    squares = (values - values.mean(0)).square().sum(0)
    fourth = (values - values.quantile(0.5, 0)).pow(4).sum(0)
    kurtosis = (number * fourth / squares.square()).nan_to_num(3.0)
    return (2 * freedom / (kurtosis - (number - 3) / number)).clamp_max(freedom)


def deviation_interval(samples: Tensor, level: float = 0.95) -> Tensor:
    r"""Return a confidence interval of the standard deviation of independent samples ``(2, ...)``.

    .. math:: \left[ s \sqrt{\nu / \chi^2_{\nu, (1 + \ell) / 2}},\; s \sqrt{\nu / \chi^2_{\nu, (1 - \ell) / 2}} \right]

    with the degrees of freedom :math:`\nu` of :func:`component_intervals` for n samples; it covers as those do.

    Args:
        samples: Samples ``(runs, ...)``, at least two.
        level: Confidence level.

    Example:
        >>> deviation_interval(torch.tensor([1.0, 2.0, 3.0, 4.0])).round(decimals=2)
        tensor([0.7300, 4.8100], dtype=torch.float64)
    """
    values = samples.double()
    degrees = _effective(values, len(values) - 1)
    squares = degrees * (values - values.mean(0)).square().sum(0) / (len(values) - 1)
    ends = [special.chdtri(degrees.cpu().numpy(), share) for share in ((1 - level) / 2, (1 + level) / 2)]
    return torch.stack([(squares / torch.as_tensor(end, device=samples.device)).sqrt() for end in ends])


def component_changes(crossed: Crossed, baseline: Tensor, predicted: Tensor, effect: int) -> tuple[Tensor, Tensor]:
    r"""Return the change of a variance component and its standard error, each ``(...)``.

    With :math:`u = y - x` and :math:`v = y + x`, the change is a component of the products,
    :math:`\hat\sigma^2_y - \hat\sigma^2_x = \hat\sigma_{uv}`. Its standard error is that of Gaussian effects, in which
    a mean product :math:`M_{uv}` has the variance :math:`(M_{uu} M_{vv} + M_{uv}^2) / \nu`.

    Args:
        crossed: The crossed runs.
        baseline: Samples x, broadcastable against ``predicted`` ``(runs, ...)``.
        predicted: Samples y ``(runs, ...)``.
        effect: Position of the effect in ``crossed.effects``.
    """
    change, variance = _change(crossed, baseline, predicted, effect, is_test=False)
    return change, variance.sqrt()


def component_change_p_values(crossed: Crossed, baseline: Tensor, predicted: Tensor, effect: int) -> Tensor:
    r"""Return p-values of no change of a variance component ``(...)``; NaN if the sources have too few seeds.

    Student's t with :math:`\nu - 1` degrees of freedom, where :math:`\nu` are those of the effect. For a single source,
    this is the test of Pitman and Morgan (*Biometrika* 31, 1939): without a change, u and v do not correlate, and
    :math:`M_{uv}` has the variance :math:`(M_{uu} M_{vv} - M_{uv}^2) / (\nu - 1)`. What the refining effects add to
    :math:`M_{uv}`, :math:`\epsilon`, adds :math:`2 \epsilon^2 / \nu`. In simulations with 4 to 16 seeds of a source,
    tests at 5 % found a change where there was none in 0.8 to 5 % of cases for Gaussian effects, and in up to 6.4 %
    for Student's t and 7 % for exponential effects (``benchmarks/variance_by_source.py``).

    Args:
        crossed: The crossed runs.
        baseline: As for :func:`component_changes`.
        predicted: As for :func:`component_changes`.
        effect: As for :func:`component_changes`.
    """
    freedom = crossed.freedom[effect] - 1
    change, variance = _change(crossed, baseline, predicted, effect, is_test=True)
    if freedom < 1:
        return torch.full_like(change, torch.nan)
    t = torch.where(change == 0, 0.0, change / variance.sqrt())
    return torch.as_tensor(2 * stats.t.sf(t.abs().cpu().numpy(), freedom), device=change.device)


def _change(crossed: Crossed, baseline: Tensor, predicted: Tensor, effect: int, is_test: bool) -> tuple[Tensor, Tensor]:
    difference = crossed.deviations(predicted - baseline)
    total = crossed.deviations(predicted + baseline)
    squares = crossed.mean_products(difference, difference), crossed.mean_products(total, total)
    products, weights = crossed.mean_products(difference, total), crossed.weights(effect)
    change: Tensor = sum(weight * products[n] for n, weight in weights)  # type: ignore[assignment]
    refining = products[effect] - change * crossed.repeats[effect]
    variance = torch.zeros_like(change)
    for number, weight in weights:
        both, product = squares[0][number] * squares[1][number], products[number].square()
        freedom = crossed.freedom[number]
        if number == effect and is_test:
            of_product = (both - product).clamp_min(0) / max(freedom - 1, 1) + 2 * refining.square() / freedom
        else:
            of_product = (both + product) / freedom
        variance += weight**2 * of_product
    return change, variance
