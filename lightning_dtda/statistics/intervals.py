"""Confidence intervals of an influence over seeds."""

from __future__ import annotations

import torch
from scipy import special
from torch import Tensor

from lightning_dtda.statistics.differences import Difference
from lightning_dtda.statistics.differences.variance import variance
from lightning_dtda.statistics.resampling import drawn_again


def bootstrap_interval(
    difference: Difference, baseline: Tensor, predicted: Tensor, level: float, replicates: int
) -> Tensor:
    r"""Return the bias-corrected and accelerated bootstrap interval of a difference over runs.

    Runs are drawn with replacement, X and Y of a run together. The ends are the quantiles of the replicates at

    .. math::
        \Phi\left(z_0 + \frac{z_0 + z}{1 - a (z_0 + z)}\right),

    where z are the normal quantiles of :math:`(1 \mp level) / 2`, :math:`z_0` is the normal quantile of the share of
    replicates below the difference, and a is the skewness of the leave-one-out differences divided by 6 (Efron,
    *Journal of the American Statistical Association* 82, 1987).

    Args:
        difference: The difference.
        baseline: Samples of X ``(runs, ...)``.
        predicted: Samples of Y ``(runs, ...)``.
        level: Confidence level.
        replicates: Number of bootstrap draws, which are the same in every call.

    Returns:
        Lower and upper end ``(2, ...)``.
    """
    observed = difference(baseline, predicted)
    draws = torch.empty(replicates, *observed.shape, dtype=observed.dtype, device=observed.device)
    for draw, replicate in zip(draws, drawn_again(difference, baseline, predicted, replicates), strict=True):
        draw.copy_(replicate)
    # ties count half; the share is never 0 or 1, whose quantile is infinite
    below = (draws < observed).sum(0) + 0.5 * (draws == observed).sum(0)
    bias = torch.special.ndtri((below.to(observed.dtype) + 0.5) / (replicates + 1))
    acceleration = _acceleration(difference, baseline, predicted)
    ordered = draws.sort(0).values
    tails = torch.special.ndtri(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)).tolist()
    ends = []
    for tail in tails:
        share = torch.special.ndtr(bias + (bias + tail) / (1 - acceleration * (bias + tail)))
        position = share * (replicates - 1)
        lower = position.floor().long()
        values = ordered.gather(0, torch.stack([lower, (lower + 1).clamp_max(replicates - 1)]))
        ends.append(torch.lerp(values[0], values[1], position - lower))
    return torch.stack(ends)


def _acceleration(difference: Difference, baseline: Tensor, predicted: Tensor) -> Tensor:
    without = torch.stack(list(difference.leave_one_out(baseline, predicted)))
    below = without.mean(0) - without
    return (below.pow(3).sum(0) / (6 * below.square().sum(0).pow(1.5))).nan_to_num(0)


def student_interval(*samples: Tensor, level: float) -> Tensor:
    r"""Return the confidence interval of a mean, or of the difference of two means, by Student's t.

    .. math:: \bar y - \bar x \pm t_{\nu}\, \sqrt{\tfrac{s_y^2}{n_y} + \tfrac{s_x^2}{n_x}}, \qquad
        \nu = \frac{(s_y^2 / n_y + s_x^2 / n_x)^2}{(s_y^2 / n_y)^2 / (n_y - 1) + (s_x^2 / n_x)^2 / (n_x - 1)}

    (Welch, *Biometrika* 34, 1947); for one sample, :math:`\nu = n_y - 1`.

    Args:
        samples: One sample ``(n_y, ...)``, or two for the mean of the first minus that of the second.
        level: Confidence level.

    Returns:
        Lower and upper end ``(2, ...)``; equal where the samples have no spread.

    Example:
        >>> student_interval(torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64), level=0.5)
        tensor([0.5286, 1.4714], dtype=torch.float64)
    """
    means = [sample.mean(0) for sample in samples]
    center = means[0] - means[1] if len(samples) == 2 else means[0]
    errors = torch.stack([variance(sample) / len(sample) for sample in samples])
    apart = torch.stack([error.square() / (len(s) - 1) for error, s in zip(errors, samples, strict=True)])
    freedom = (errors.sum(0).square() / apart.sum(0)).nan_to_num(1)
    quantile = torch.as_tensor(special.stdtrit(freedom.cpu().numpy(), (1 + level) / 2), device=center.device)
    width = quantile * errors.sum(0).sqrt()
    return torch.stack([center - width, center + width])
