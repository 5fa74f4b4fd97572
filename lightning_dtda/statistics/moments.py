"""Mean and spread of samples over runs: changes, standard errors and tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_dtda.statistics.significance import of_any
from lightning_dtda.statistics.signs import sign_test
from lightning_dtda.statistics.student import student_ends, student_p_values

ROUNDING = 8
"""Multiple of the floating-point precision below which a deviation from the mean is rounding."""


def variance(samples: Tensor) -> Tensor:
    """Return the unbiased variance along the first dimension, eight times faster than ``Tensor.var`` does.

    Args:
        samples: ``(runs, ...)``.
    """
    return (samples - samples.mean(0)).square_().sum(0) / (len(samples) - 1)


def log_spread_change(baseline: Tensor, predicted: Tensor) -> Tensor:
    r"""Return :math:`\log \hat\sigma_Y - \log \hat\sigma_X` ``(...)``.

    Zero where neither has any spread; infinite where only one has.

    Args:
        baseline: Samples of X ``(runs, ...)``.
        predicted: Samples of Y ``(runs, ...)``.
    """
    of_x, of_y = (_squares(samples).sum(0) / (len(samples) - 1) for samples in (baseline, predicted))
    change = (of_y / of_x).log() / 2
    rounding = ROUNDING * torch.finfo(change.dtype).eps * baseline.abs().amax(0)
    unchanged = (change.abs() * of_x.sqrt() <= rounding) | ((of_x == 0) & (of_y == 0))
    return torch.where(unchanged, 0.0, change)


def log_spread_error(baseline: Tensor, predicted: Tensor) -> Tensor:
    r"""Return the standard error of :func:`log_spread_change` over runs ``(...)``; NaN with fewer than 3 runs.

    .. math::
        \widehat{se}^2 = \frac{S - 1}{S} \sum_s (u_s - \bar u)^2, \qquad
        u_s = \frac12 \left( \frac{\hat\sigma_Y^2}{\hat\sigma_{Y(s)}^2}
        - \frac{\hat\sigma_X^2}{\hat\sigma_{X(s)}^2} \right),

    where :math:`\hat\sigma_{(s)}` is the spread of the other runs. The jackknife has the logarithm of each ratio in
    place of the ratio, and is too small where a single run makes most of the spread: for exponential samples, intervals
    of 95 % then hold the change in 90 to 93 % of ensembles, and with this one in 94 to 96 %
    (``benchmarks/significance.py``). Squared deviations are thus taken relative to the spread of the other runs, as the
    residuals of a regression are by the covariance estimator HC3 (MacKinnon and White, *Journal of Econometrics* 29,
    1985).

    Args:
        baseline: Samples of X ``(runs, ...)``.
        predicted: Samples of Y ``(runs, ...)``.
    """
    unknown = (baseline.sum(0) + predicted.sum(0)).isnan()
    if len(predicted) < 3:
        return torch.full_like(unknown, torch.nan, dtype=predicted.dtype)
    error = _error_of_logarithm(_spread_without(predicted) - _spread_without(baseline))
    # the terms are about 1: without any response, they differ by rounding, as sums in another order do
    error = error.where(error > ROUNDING * torch.finfo(error.dtype).eps, 0.0)
    return error.where(~unknown, torch.nan)


def size_interval(samples: Tensor, level: float) -> Tensor:
    r"""Return the confidence interval of the root mean square :math:`\sqrt{E X^2}` ``(2, ...)``, by Student's t.

    As for :func:`log_spread_error`, on a logarithmic scale, with sums of squares in place of variances.

    Args:
        samples: ``(runs, ...)``.
        level: Confidence level.
    """
    squares = samples.square()
    total = squares.sum(0)
    terms = _relative(total * ((len(samples) - 1) / len(samples)), total - squares)
    return _interval_of_logarithm((total / len(samples)).log() / 2, terms, level)


def common_spread_interval(baseline: Tensor, predicted: Tensor, level: float) -> Tensor:
    r"""Return the confidence interval of :math:`\sqrt{\sigma_X \sigma_Y}` ``(2, ...)``, as :func:`size_interval` does.

    Args:
        baseline: Samples of X ``(runs, ...)``.
        predicted: Samples of Y ``(runs, ...)``.
        level: Confidence level.
    """
    terms = (_spread_without(predicted) + _spread_without(baseline)) / 2
    return _interval_of_logarithm((variance(predicted) * variance(baseline)).log() / 4, terms, level)


def spread_interval(samples: Tensor, level: float) -> Tensor:
    """Return the confidence interval of the standard deviation ``(2, ...)``, as :func:`size_interval` does.

    Args:
        samples: ``(runs, ...)``.
        level: Confidence level.
    """
    return _interval_of_logarithm(variance(samples).log() / 2, _spread_without(samples), level)


def _interval_of_logarithm(logarithm: Tensor, terms: Tensor, level: float) -> Tensor:
    return student_ends(logarithm, _error_of_logarithm(terms), len(terms) - 1, level).exp()


def _error_of_logarithm(terms: Tensor) -> Tensor:
    """Return the standard error of half a logarithm, from the relative sums of :func:`_relative` ``(runs, ...)``."""
    runs = len(terms)
    squares = (terms - terms.mean(0)).square_().sum(0) * ((runs - 1) / runs)
    # infinite where a single run makes all of the sum: nothing is known
    return squares.sqrt().nan_to_num(torch.inf, torch.inf) / 2


def _spread_without(samples: Tensor) -> Tensor:
    """Return the variance of all runs relative to that without each ``(runs, ...)``; 1 where there is no spread."""
    runs, squares = len(samples), _squares(samples)
    total = squares.sum(0)
    return _relative(total * ((runs - 2) / (runs - 1)), total - squares * (runs / (runs - 1)))


def _relative(total: Tensor, without: Tensor) -> Tensor:
    # where a single run makes all of the sum, the others leave nothing but rounding
    rounding = ROUNDING * len(without) * torch.finfo(without.dtype).eps * total
    return torch.where(total == 0, 1.0, total / without.where(without > rounding, 0.0))


def _squares(samples: Tensor) -> Tensor:
    """Return squared deviations from the mean ``(runs, ...)``, zero where they are rounding."""
    deviations = samples - samples.mean(0)
    rounding = ROUNDING * torch.finfo(samples.dtype).eps * samples.abs().amax(0)
    return torch.where(deviations.abs() <= rounding, 0.0, deviations).square_()


def mean_test(baseline: Tensor, predicted: Tensor) -> Tensor:
    """Return two-sided p-values of E X = E Y ``(...)``, float64, by Student's t of the responses.

    Args:
        baseline: Samples of X ``(runs, ...)``.
        predicted: Samples of Y ``(runs, ...)``.
    """
    responses = (predicted - baseline).double()
    return student_p_values(responses.mean(0), (variance(responses) / len(responses)).sqrt(), len(responses) - 1)


def spread_test(baseline: Tensor, predicted: Tensor) -> Tensor:
    r"""Return two-sided p-values of Var X = Var Y ``(...)``, float64: the larger one of two tests.

    One is Student's t of the change of the log spread. It asks for no more than equal variances, but far out in its
    tails, where thousands of tests are decided, it rejects too often: Gaussian samples of 20 runs twice, heavy-tailed
    ones ten times. The other exchanges x and y in any of the runs, and holds far out for any distribution that X and Y
    share, but not where their shapes differ. With the halfway point :math:`v_s = (x_s + y_s) / 2`, the change of the
    variance is a multiple of

    .. math:: T = \sum_s (r_s - \tilde r)(v_s - \bar v) = \frac{S - 1}{2} (\hat\sigma_Y^2 - \hat\sigma_X^2),

    and an exchange flips the sign of a term (:func:`~lightning_dtda.statistics.signs.sign_test`). T does not depend on
    the shift :math:`\tilde r`, but its values after exchanges do, and a common shift would hide a change of the spread.
    It is estimated by the mean of the responses with weights :math:`(1 + z_s^2)^{-2}`, where :math:`z_s` is
    :math:`v_s - \bar v` in standard deviations, since responses are often largest in outlying runs. No p-value is below
    :math:`2^{1-S}`.

    Args:
        baseline: Samples of X ``(runs, ...)``.
        predicted: Samples of Y ``(runs, ...)``.
    """
    x, y = baseline.double(), predicted.double()
    by_student = student_p_values(log_spread_change(x, y), log_spread_error(x, y), len(y) - 1)
    responses, halfway = y - x, (x + y) / 2
    halfway -= halfway.mean(0)
    squares = halfway.square()
    weights = (1 + squares / squares.mean(0).clamp_min(torch.finfo(squares.dtype).tiny)).pow_(-2)
    shift = (weights * responses).sum(0) / weights.sum(0)
    return by_student.maximum(sign_test((responses - shift) * halfway))


TESTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mean": mean_test, "variance": spread_test}
"""Test of the change of each moment, from samples of X and Y."""


@dataclass(frozen=True, eq=False)
class Pairs:
    """Samples of X and Y from the same runs, whose moments are tested once for all differences.

    Args:
        baseline: Samples of X, broadcastable against ``predicted`` ``(runs, ...)``.
        predicted: Samples of Y ``(runs, ...)``.
    """

    baseline: Tensor
    predicted: Tensor
    _tested: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def p_values(self, moments: Sequence[str]) -> Tensor:
        """Return p-values of a change of any of the moments ``(...)``, float64."""
        for moment in moments:
            if moment not in self._tested:
                self._tested[moment] = TESTS[moment](self.baseline, self.predicted)
        return of_any([self._tested[moment] for moment in moments])
