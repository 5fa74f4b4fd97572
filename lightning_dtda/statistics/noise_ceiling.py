"""Noise ceiling: the score that a prediction without any error would get against a noisy truth."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_dtda.statistics.correlation import Correlation, correlations
from lightning_dtda.statistics.differences import Difference
from lightning_dtda.statistics.reliability import SPLITS, spearman_brown, split_half
from lightning_dtda.statistics.samples import Samples


@dataclass(frozen=True, eq=False)
class NoiseCeiling:
    """Limits that the noise of the truth sets; NaN if there are too few seeds to halve.

    Args:
        split_half: Correlation between the influences from one half of the seeds and those from the other.
        reliability: Correlation between the influences from all seeds and those from the same number of new seeds.
        ceiling: Correlation between the influences from all seeds and those from infinitely many.
    """

    split_half: Tensor
    reliability: Tensor
    ceiling: Tensor


def noise_ceiling(samples: Samples, difference: Difference, correlation: Correlation = "spearman") -> NoiseCeiling:
    r"""Estimate the best score that the noise of the retrained influences allows, from halves of their seeds.

    Let the influence from n seeds be :math:`b = t + e`, where t is that from infinitely many and e is noise of variance
    :math:`\sigma_e^2`, independent of t. Influences from two halves of the seeds each have independent noise of
    variance :math:`2 \sigma_e^2`, so their correlation is

    .. math:: r = \frac{\sigma_t^2}{\sigma_t^2 + 2 \sigma_e^2},
        \qquad R = \frac{2 r}{1 + r} = \frac{\sigma_t^2}{\sigma_t^2 + \sigma_e^2},
        \qquad \mathrm{corr}(t, t + e) = \frac{\sigma_t}{\sqrt{\sigma_t^2 + \sigma_e^2}} = \sqrt{R} .

    R, the reliability of the truth (Spearman, *British Journal of Psychology* 3, 1910; Brown, ibid.), is the score of
    an equally large truth from other seeds. :math:`\sqrt R` is the score of the true influence t: the ceiling, which a
    prediction exceeds only by chance or by sharing the truth's noise. A prediction from few runs is itself noisy and
    cannot reach it. If the number n of seeds is odd, halves have :math:`h = (n - 1) / 2` seeds, and
    :math:`R = \kappa r / (1 + (\kappa - 1) r)` with :math:`\kappa = n / h`.

    The formulas hold for Pearson's correlation and approximately for Spearman's, and for noise that shrinks with the
    number of seeds, as it does for mean and variance. The Wasserstein distance is more biased upwards in a half than in
    the whole, so its ceiling is approximate where effects are small.

    Args:
        samples: The samples; only the real ones are used.
        difference: The difference.
        correlation: ``"spearman"`` or ``"pearson"``.

    Returns:
        The noise ceiling. r is averaged over random halvings and queries before R and its root are computed, because
        both formulas are nonlinear and r is noisy with few removals. Negative r counts as 0 in the ceiling.
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
        splits=2 * SPLITS,  # retrainings are few, and a ceiling is quoted on its own
    )
    reliability = spearman_brown(agreement, seeds / (seeds // 2))
    return NoiseCeiling(agreement, reliability, reliability.sqrt())
