"""Student's t: intervals and p-values, from an estimate and its standard error or from samples."""

from __future__ import annotations

import torch
from scipy import special
from torch import Tensor


def student_ends(estimate: Tensor, standard_error: Tensor, freedom: Tensor | float, level: float) -> Tensor:
    r"""Return the confidence interval :math:`\hat\Delta \pm t_\nu\, \widehat{se}` of an estimate.

    Args:
        estimate: Estimate ``(...)``.
        standard_error: Its standard error ``(...)``.
        freedom: Degrees of freedom, a number or ``(...)``.
        level: Confidence level.

    Returns:
        Lower and upper end ``(2, ...)``; NaN where estimate or standard error is NaN, and everything where the
        standard error is infinite.
    """
    degrees = torch.as_tensor(freedom, dtype=torch.float64)
    quantile = torch.as_tensor(special.stdtrit(degrees.cpu().numpy(), (1 + level) / 2), device=estimate.device)
    # an infinite estimate without noise has infinite ends
    width = torch.where(standard_error == 0, 0.0, quantile * standard_error)
    center = torch.where(width.isinf() & ~estimate.isnan(), 0.0, estimate)  # infinity less infinity is NaN
    return torch.stack([center - width, center + width])


def extended_to_zero(ends: Tensor, p: Tensor, level: float) -> Tensor:
    """Return intervals ``(2, ...)`` that exclude zero if and only if the p-values ``(...)`` are below ``1 - level``.

    For intervals that exclude it too often: those in doubt are extended to zero.
    """
    low, high = ends
    doubtful = p >= 1 - level
    return torch.stack([low.where(~doubtful | (low < 0), 0.0), high.where(~doubtful | (high > 0), 0.0)])


def student_p_values(estimate: Tensor, standard_error: Tensor, freedom: float) -> Tensor:
    """Return two-sided p-values of an effect of zero, from its estimate and standard error ``(...)``; float64."""
    # 0 / 0 is no effect; anything else / 0 is an effect without noise; with infinite noise, nothing is known
    unknown = standard_error.isinf() & ~estimate.isnan()
    t = torch.where((estimate == 0) | unknown, 0.0, estimate / standard_error).double()
    return torch.as_tensor(2 * special.stdtr(freedom, -t.abs().cpu().numpy()), device=t.device)


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
    errors = torch.stack([_variance(sample) / len(sample) for sample in samples])
    apart = torch.stack([error.square() / (len(s) - 1) for error, s in zip(errors, samples, strict=True)])
    freedom = (errors.sum(0).square() / apart.sum(0)).nan_to_num(1)
    return student_ends(center, errors.sum(0).sqrt(), freedom, level)


def _variance(sample: Tensor) -> Tensor:
    # without the warning of Tensor.var, where a sample of one has none
    return (sample - sample.mean(0)).square().sum(0) / (len(sample) - 1)
