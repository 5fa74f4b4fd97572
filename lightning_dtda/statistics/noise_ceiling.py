"""How well a prediction without any error could score, since the truth it is compared with is noisy."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_dtda.statistics.correlation import Correlation, correlations
from lightning_dtda.statistics.differences import Difference
from lightning_dtda.statistics.reliability import spearman_brown, split_half
from lightning_dtda.statistics.samples import Samples


@dataclass(frozen=True, eq=False)
class NoiseCeiling:
    """What the noise of the truth allows; NaN where there are too few seeds to be halved.

    Args:
        split_half: Correlation of the influences from one half of the seeds with those from the other.
        reliability: Correlation of the influences from all seeds with those from as many others.
        ceiling: Correlation of the influences from all seeds with those from infinitely many.
    """

    split_half: Tensor
    reliability: Tensor
    ceiling: Tensor


def noise_ceiling(samples: Samples, difference: Difference, correlation: Correlation = "spearman") -> NoiseCeiling:
    r"""Estimate the best score that the noise of the retrained influences allows, from halves of their seeds.

    Let the influence from n seeds be :math:`b = t + e`, t being that of infinitely many and e noise of variance
    :math:`\sigma_e^2`, independent of t. Influences from two halves of the seeds have noise of variance
    :math:`2 \sigma_e^2` each, which is independent, hence correlate with

    .. math:: r = \frac{\sigma_t^2}{\sigma_t^2 + 2 \sigma_e^2},
        \qquad R = \frac{2 r}{1 + r} = \frac{\sigma_t^2}{\sigma_t^2 + \sigma_e^2},
        \qquad \mathrm{corr}(t, t + e) = \frac{\sigma_t}{\sqrt{\sigma_t^2 + \sigma_e^2}} = \sqrt{R} .

    R, the reliability of the truth (Spearman, *British Journal of Psychology* 3, 1910; Brown, ibid.), is what an equal
    truth with other seeds would score. :math:`\sqrt R` is what the true influence t would score: the ceiling, which a
    prediction exceeds only by chance or by sharing the truth's noise. A prediction from few runs is noisy itself and
    cannot reach it. With an odd number n of seeds, halves have :math:`h = (n - 1) / 2`, and
    :math:`R = \kappa r / (1 + (\kappa - 1) r)` with :math:`\kappa = n / h`.

    The formulas hold for Pearson's correlation and nearly for Spearman's, and for noise that shrinks with the number of
    seeds, as that of mean and variance does. The Wasserstein distance is biased upwards in a half more than in the
    whole, so that its ceiling is approximate where effects are small.

    Args:
        samples: The samples, of which the real ones are looked at.
        difference: The difference.
        correlation: ``"spearman"`` or ``"pearson"``.

    Returns:
        r is averaged over random halvings and queries before R and its root are taken, since both formulas bend, and of
        few removals r is noisy. Negative r counts as 0 in the ceiling.
    """
    seeds, baseline_seeds = len(samples.real), len(samples.real_baseline)
    # each half needs what the difference needs, and a spread within it
    if min(seeds, baseline_seeds) < 2 * max(difference.least_runs, 2):
        unknown = torch.full((), torch.nan, dtype=torch.float64)
        return NoiseCeiling(unknown, unknown, unknown)
    agreement = split_half(
        lambda some, of_baseline: samples.real_influence(difference, some, of_baseline),
        (seeds, baseline_seeds),
        lambda one, other: correlations(one, other, correlation).nanmean(),
    )
    reliability = spearman_brown(agreement, seeds / (seeds // 2))
    return NoiseCeiling(agreement, reliability, reliability.sqrt())
