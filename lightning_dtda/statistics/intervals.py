"""Between which values an influence lies, over seeds."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_dtda.statistics.differences import Difference


def bootstrap_interval(
    difference: Difference, baseline: Tensor, predicted: Tensor, level: float, replicates: int
) -> Tensor:
    r"""Return the bias-corrected and accelerated bootstrap interval of a difference over runs.

    Runs are drawn with replacement, X and Y of a run together. The ends are quantiles of the replicates, at

    .. math::
        \Phi\left(z_0 + \frac{z_0 + z}{1 - a (z_0 + z)}\right),

    z being the normal quantiles of :math:`(1 \mp level) / 2`, where :math:`z_0` is the normal quantile of the share of
    replicates below the difference, and a the skewness of the leave-one-out differences divided by 6 (Efron, *Journal
    of the American Statistical Association* 82, 1987).

    Args:
        difference: The difference.
        baseline: Samples of X ``(runs, ...)``.
        predicted: Samples of Y ``(runs, ...)``.
        level: Its confidence.
        replicates: Number of draws, always the same ones.

    Returns:
        ``(2, ...)``, lower and upper end.
    """
    runs, generator = len(predicted), torch.Generator().manual_seed(0)
    observed = difference(baseline, predicted)
    draws = torch.empty(replicates, *observed.shape, dtype=observed.dtype, device=observed.device)
    for draw in draws:
        rows = torch.randint(runs, (runs,), generator=generator).to(predicted.device)
        draw.copy_(difference(baseline[rows], predicted[rows]))
    # half of the ties; never a share of 0 or 1, whose quantile is infinite
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
    falls = without.mean(0) - without
    return (falls.pow(3).sum(0) / (6 * falls.square().sum(0).pow(1.5))).nan_to_num(0)
