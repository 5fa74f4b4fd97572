"""Confidence intervals of several means that hold together."""

from __future__ import annotations

import torch
from scipy import special
from torch import Tensor

from lightning_dtda.statistics.moments import variance

_DRAWS = 4_000
"""Number of draws for a quantile; at 0.95, its level is right to 0.003 (one standard error)."""

_AT_ONCE = 2**21
"""Number of random numbers at a time: 16 MiB."""


def simultaneous_intervals(sample: Tensor, level: float) -> Tensor:
    r"""Return intervals of K means that all hold at once with a probability of ``level``.

    .. math:: \bar x_k \pm c\, \frac{s_k}{\sqrt n}, \qquad P\left(\max_k |t_k| \le c\right) = \text{level},

    where the :math:`t_k` are Student's t of n Gaussian draws with the correlations of the sample (Westfall and Young,
    *Resampling-Based Multiple Testing*, 1993). So the mean that looks best may be chosen by its interval. The more the
    means are correlated, the smaller is c; a single one has Student's.

    Args:
        sample: Sample ``(n, K)``.
        level: Confidence level of all intervals together.

    Returns:
        Lower and upper ends ``(2, K)``; equal where the sample has no spread.

    Example:
        >>> sample = torch.tensor([[0.0, 0.1], [1.0, 0.9], [2.0, 2.1]], dtype=torch.float64)
        >>> simultaneous_intervals(sample[:, :1], 0.5)
        tensor([[0.5286],
                [1.4714]], dtype=torch.float64)
        >>> simultaneous_intervals(sample, 0.5)[0, 0] < 0.5286
        tensor(True)
    """
    number, means = sample.shape
    errors = (variance(sample) / number).sqrt()
    varied = errors > 0
    alone, bonferroni = (float(special.stdtrit(number - 1, 1 - (1 - level) / (2 * k))) for k in (1, max(means, 1)))
    quantile = alone
    if int(varied.sum()) > 1:
        standard = (sample[:, varied] - sample[:, varied].mean(0)) / (errors[varied] * number**0.5)
        # the extremes: means that are all the same, and any means
        quantile = min(max(_quantile_of_largest(standard, level), alone), bonferroni)
    return torch.stack([sample.mean(0) - quantile * errors, sample.mean(0) + quantile * errors])


def _quantile_of_largest(standard: Tensor, level: float) -> float:
    """Return the quantile of the largest absolute t of samples with the correlations of this one, by simulation."""
    number, means = standard.shape
    eigenvalues, vectors = torch.linalg.eigh(standard.T @ standard / (number - 1))
    root = vectors * eigenvalues.clamp_min(0).sqrt()
    generator = torch.Generator().manual_seed(0)
    size, largest = max(1, _AT_ONCE // (number * means)), []
    for start in range(0, _DRAWS, size):
        shape = (min(size, _DRAWS - start), number, means)
        drawn = (torch.randn(shape, generator=generator, dtype=torch.float64) @ root.T.cpu()).transpose(0, 1)
        largest.append((drawn.mean(0) / (variance(drawn) / number).sqrt()).abs().amax(1))
    return float(torch.cat(largest).quantile(level))
