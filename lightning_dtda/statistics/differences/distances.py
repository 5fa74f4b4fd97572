"""Distances, which are never negative: does the measurement's distribution change in any way?"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_dtda.statistics.differences.difference import Difference, Inference
from lightning_dtda.statistics.differences.mean import Mean
from lightning_dtda.statistics.differences.spread import Spread
from lightning_dtda.statistics.moments import Pairs, common_spread_interval, size_interval, spread_interval, variance


class Wasserstein(Difference):
    r"""2-Wasserstein distance between the empirical distributions of a one-dimensional measurement.

    :math:`W_2^2 = \frac1S \sum_i (x_{(i)} - y_{(i)})^2` with both samples sorted. For samples of different sizes, the
    equivalent :math:`W_2^2 = \int_0^1 (F_X^{-1}(u) - F_Y^{-1}(u))^2\,du` is used (Villani, *Topics in Optimal
    Transportation*, 2003, theorem 2.18). In the measurement's unit, never negative, and zero only if nothing moved, so
    it is biased upwards where the effect is smaller than its standard error.

    Example:
        >>> Wasserstein()(torch.tensor([1.0, 3.0]), torch.tensor([4.0, 0.0]))
        tensor(1.)
    """

    name = "wasserstein"
    title = "Wasserstein influence"
    formula = "W₂(X, Y)"
    meaning = "Wasserstein distance by which the {measurement}'s distribution moves"
    unit = "the {measurement}'s unit"
    signed = False
    moments = ("mean", "variance")

    def __call__(self, baseline: Tensor, predicted: Tensor) -> Tensor:
        """Return ``W_2(X, Y)``."""
        x, y = baseline.sort(0).values, predicted.sort(0).values
        if len(x) == len(y):
            return (x - y).square().mean(0).sqrt()
        # where either quantile function steps, in units of 1 / (len(x) len(y)), which are exact
        steps = torch.cat([torch.arange(len(x)) * len(y), torch.arange(len(y)) * len(x)]).unique()
        lengths = steps.diff(append=torch.tensor([len(x) * len(y)])).to(x)
        x, y = x[(steps // len(y)).to(x.device)], y[(steps // len(x)).to(y.device)]
        return torch.tensordot(lengths / lengths.sum(), (x - y).square(), 1).sqrt()

    def leave_one_out(self, baseline: Tensor, predicted: Tensor) -> Tensor:
        """Return the distance without each run ``(runs, ...)``, in the time of a few distances.

        The runs are sorted once. Without one whose x has rank a and whose y has rank b, pairs below both and above both
        ranks stay, and those between them are of neighbours.
        """
        (x, order_of_x), (y, order) = baseline.sort(0), predicted.sort(0)
        b = torch.arange(len(y), device=y.device).reshape(-1, *[1] * (y.ndim - 1))
        a = order_of_x.argsort(0).expand_as(order).gather(0, order)
        # whether the same runs are below a gap in x and in y: no pair across it is needed, and a large one would hide
        # in rounding how little the others moved
        crossed = (a - b).cumsum(0)[:-1] > 0
        # sums below each rank: of pairs, of x with the y one below, and of x with the y one above
        same = _sums_below((x - y).square_())
        with_below = _sums_below((x[1:] - y[:-1]).square_() * crossed)
        with_above = _sums_below((x[:-1] - y[1:]).square_() * crossed)
        lower = with_below - same[1:] - (with_below - same[:-1]).gather(0, a)
        higher = (with_above - same[1:]).gather(0, a) - (with_above - same[:-1])
        squares = (same[-1] + torch.where(a <= b, lower, higher)).clamp_min(0) / (len(y) - 1)
        return torch.empty_like(squares).scatter_(0, order, squares.sqrt_())

    def no_interval(self, runs: int) -> str:
        """Return why there is no interval with a number of runs, or an empty text."""
        return Spread().no_interval(runs)

    def inference(self, pairs: Pairs, level: float) -> Inference:
        r"""Return the distance, its standard error, p-values, and an interval that is above zero if p is small.

        The estimate is biased upwards, so the interval comes from bounds of the distance itself:

        .. math::
            (\mu_Y - \mu_X)^2 + (\sigma_Y - \sigma_X)^2 \le W_2^2(X, Y) \le E (Y - X)^2

        (Gelbrich, *Mathematische Nachrichten* 147, 1990; the right-hand side is the cost of pairing by seed). The lower
        end is the smallest left-hand side within the intervals of the mean, of the spread :math:`\log \sigma_Y - \log
        \sigma_X` and of :math:`\sqrt{\sigma_X \sigma_Y}`, which err half as often as ``1 - level`` (Bonferroni). It is
        positive if and only if p is below ``1 - level``. The upper end is that of the right-hand side; it errs an
        eighth as often by Student's t, and so no more than promised for skewed samples.

        Args:
            pairs: Samples of X and Y.
            level: Confidence level of the interval.
        """
        baseline, predicted = pairs.baseline, pairs.predicted
        if self.no_interval(len(predicted)):
            return super().inference(pairs, level)
        of_each = (1 + level) / 2
        shift, change = (_away_from_zero(moment.inference(pairs, of_each).interval) for moment in (Mean(), Spread()))
        spread = common_spread_interval(baseline, predicted, of_each)[0]
        # where only one of both has a spread, the change is infinite, and that spread the difference
        lone = torch.maximum(*(spread_interval(each, of_each)[0] for each in (baseline, predicted)))
        lower = (shift.square() + torch.where(change.isinf(), lone, 2 * spread * (change / 2).sinh()).square()).sqrt()
        return Inference(
            self(baseline, predicted),
            self.standard_error(baseline, predicted),
            pairs.p_values(self.moments),
            torch.stack([lower, size_interval(predicted - baseline, (3 + level) / 4)[1]]),
        )


def _sums_below(values: Tensor) -> Tensor:
    """Return the sums of the values before each position, and of all ``(positions + 1, ...)``."""
    return torch.nn.functional.pad(values.cumsum(0), (0, 0) * (values.ndim - 1) + (1, 0))


def _away_from_zero(ends: Tensor) -> Tensor:
    """Return the smallest absolute value in intervals ``(2, ...)``."""
    return torch.maximum(ends[0], -ends[1]).clamp_min(0)


class Energy(Difference):
    r"""Energy distance between the distributions of a one-dimensional measurement.

    .. math::
        D^2 = 2\, E|X - Y| - E|X - X'| - E|Y - Y'| = 2 \int (F_X - F_Y)^2

    for the empirical distributions (Székely and Rizzo, *Journal of Statistical Planning and Inference* 143, 2013). In
    the square root of the measurement's unit, never negative. Outlying values count less than in the Wasserstein
    distance; like it, D is biased upwards where the effect is small.

    Example:
        >>> Energy()(torch.tensor([0.0, 0.0]), torch.tensor([2.0, 2.0]))
        tensor(2.)
    """

    name = "energy"
    formula = "D(X, Y)"
    meaning = "energy distance by which the {measurement}'s distribution moves"
    unit = "the square root of the {measurement}'s unit"
    signed = False
    moments = ("mean", "variance")

    def __call__(self, baseline: Tensor, predicted: Tensor) -> Tensor:
        """Return ``D(X, Y)``."""
        x, y = len(baseline), len(predicted)
        shape = torch.broadcast_shapes(baseline.shape[1:], predicted.shape[1:])
        values, order = torch.cat([baseline.expand(x, *shape), predicted.expand(y, *shape)]).sort(0)
        # F_X - F_Y is constant between neighbouring values; multiplied by x y it is an exact integer
        heights = torch.where(order < x, y, -x).cumsum(0)[:-1].to(values.dtype) / (x * y)
        return (2 * heights.square_().mul_(values.diff(dim=0)).sum(0)).sqrt()


class GaussianKL(Difference):
    r"""Kullback-Leibler divergence of Y from X, both taken as Gaussians with the samples' moments.

    .. math::
        D(\mathcal N_Y \Vert \mathcal N_X) = \tfrac12 \left(
        \frac{\mathrm{Var}\, Y}{\mathrm{Var}\, X} - 1 - \log \frac{\mathrm{Var}\, Y}{\mathrm{Var}\, X}
        + \frac{(E Y - E X)^2}{\mathrm{Var}\, X} \right)

    The distribution as trained is the reference, so all removals are measured relative to the same spread. In nats,
    independent of the measurement's unit, so queries of any scale can be compared. Never negative. Infinite where a
    variance is zero and something changes.

    Example:
        >>> GaussianKL()(torch.tensor([-1.0, 1.0]), torch.tensor([0.0, 2.0]))
        tensor(0.2500)
    """

    name = "gaussian_kl"
    title = "Gaussian divergence"
    formula = "KL(Y ‖ X)"
    meaning = "divergence of the {measurement}'s distribution from what it is, both taken as Gaussian,"
    unit = "nats; a shift by one standard deviation is 0.5"
    signed = False
    least_runs = 2
    moments = ("mean", "variance")

    def __call__(self, baseline: Tensor, predicted: Tensor) -> Tensor:
        """Return ``D(N_Y || N_X)``."""
        of_baseline, shift = variance(baseline), predicted.mean(0) - baseline.mean(0)
        # Var Y / Var X - 1, for log1p: the divergence is second order in it
        excess = (variance(predicted) - of_baseline) / of_baseline
        divergence = (excess - excess.log1p() + shift.square() / of_baseline) / 2
        # also for samples of different sizes that have no spread
        unmoved = (baseline == baseline[0]).all(0) & (predicted == baseline[0]).all(0)
        unknown = (baseline.sum(0) + predicted.sum(0)).isnan()
        return torch.where(unmoved, 0.0, divergence.nan_to_num(torch.inf, torch.inf)).where(~unknown, torch.nan)
