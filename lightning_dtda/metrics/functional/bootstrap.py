"""Confidence intervals of a score, by drawing again everything that it depends on by chance."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_dtda.attribution.differences import Difference
from lightning_dtda.metrics.functional.correlation import Correlation, correlations
from lightning_dtda.metrics.functional.samples import Samples

_AT_ONCE = 2**20
"""Numbers that are drawn at a time: 8 MiB in double precision, which a cache holds; more at a time is slower."""

_SHORT_OF_ONE = 1e-9
"""Fisher's z of a perfect correlation is infinite; this far from it, z is 10.7, beyond what samples can tell apart."""


def replicated_scores(
    samples: Samples,
    difference: Difference,
    of_queries: Tensor,
    correlation: Correlation = "spearman",
    number: int = 500,
    seed: int = 0,
) -> Tensor:
    r"""Return the score in samples that are drawn again, with replacement ``(number,)``.

    Drawn are the removals, the recorded runs (X and Y of a run together), and the seeds of the truth, those of all
    removals together: what removals have in common, of one seed or of one query, stays in common. Then queries are
    drawn. A query's correlation :math:`\rho_q` is uncertain by its removals, runs and seeds, and drawing it would count
    that a second time; so its distance from the mean is shrunk to what lies between queries. With the variance
    :math:`\hat\tau^2` between the :math:`\rho_q`, of which :math:`\hat\sigma^2` is by their own uncertainty,

    .. math:: \mathrm{score}^*_b = \frac1Q \sum_q \rho^*_{b,q} + \frac{f}{Q} \sum_q (\rho_{q_b} - \bar\rho),
        \qquad f^2 = \max(0, 1 - \hat\sigma^2 / \hat\tau^2)\, \frac{Q}{Q - 1}

    (the moment estimator of DerSimonian and Laird, *Meta-analysis in Clinical Trials*, 1986, for equal weights).

    Args:
        samples: The samples.
        difference: The difference.
        of_queries: Correlation of each query in the samples ``(queries,)``; those that are NaN do not count.
        correlation: ``"spearman"`` or ``"pearson"``.
        number: How many times everything is drawn.
        seed: Of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    at_once = max(1, _AT_ONCE // max(samples.real.numel(), samples.predicted.numel()))
    sizes = [min(at_once, number - start) for start in range(0, number, at_once)]
    drawn = torch.cat([_replicates(samples, difference, correlation, size, generator) for size in sizes])
    means = drawn.nanmean(1)
    known = of_queries[~of_queries.isnan()]
    queries = len(known)
    if queries < 2:
        return means
    apart = known - known.mean()
    between = apart.square().sum() / (queries - 1)
    own = (drawn - means[:, None])[:, ~of_queries.isnan()]
    within = (own - own.nanmean(0)).square().nanmean() * queries / (queries - 1)
    # where all queries are alike, 0 / 0 is no variance between them
    shrunk = (1 - within / between).nan_to_num(0).clamp_min(0) * queries / (queries - 1)
    chosen = torch.randint(queries, (number, queries), generator=generator).to(apart.device)
    return means + shrunk.sqrt() * apart[chosen].mean(1)


def confidence_interval(score: Tensor, replicates: Tensor, confidence: float = 0.95) -> tuple[Tensor, Tensor]:
    r"""Return the limits of the interval for the score that equal experiments have on average.

    With Fisher's :math:`\zeta = \operatorname{artanh}` of the score and :math:`\zeta^*_b` of its replicates, the
    distribution of :math:`\zeta` around its expectation is taken to be that of :math:`\zeta^*_b` around their mean:

    .. math:: \left[\tanh\left(\zeta - q_{1 - \alpha/2}\right),\; \tanh\left(\zeta - q_{\alpha/2}\right)\right],
        \qquad q \text{ the quantiles of } \zeta^*_b - \overline{\zeta^*} .

    Plain percentiles of the replicates would not do: what is drawn with replacement has the noise of the experiment and
    that of the draws, and noise lowers a correlation, so that replicates lie below the score as a whole. Around their
    mean they are right; on the scale of Fisher's z their spread hardly depends on where they are, and the limits stay
    between -1 and 1 (Davison and Hinkley, *Bootstrap Methods and their Application*, 1997, section 5.2). Since
    removals and seeds are crossed, what belongs to single cells of them is counted more than once, which makes the
    interval somewhat too wide (Owen, *The pigeonhole bootstrap*, Annals of Applied Statistics 1, 2007).

    Args:
        score: The score ``()``.
        replicates: Scores of samples that were drawn again ``(number,)``; NaN, where a draw had no score, is left out.
        confidence: How often the interval covers the expected score.

    Returns:
        Lower and upper limit; NaN where there is no replicate.
    """
    known = replicates[~replicates.isnan()]
    if not len(known):
        return torch.full_like(score, torch.nan), torch.full_like(score, torch.nan)
    of_replicates = _fisher(known)
    tails = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=known.dtype, device=known.device)
    below, above = (of_replicates - of_replicates.mean()).quantile(tails)
    return (_fisher(score) - above).tanh(), (_fisher(score) - below).tanh()


def _fisher(correlation: Tensor) -> Tensor:
    return correlation.clamp(_SHORT_OF_ONE - 1, 1 - _SHORT_OF_ONE).atanh()


def _replicates(
    samples: Samples, difference: Difference, correlation: Correlation, number: int, generator: torch.Generator
) -> Tensor:
    """Return the correlation of each query in samples that are drawn again ``(number, queries)``."""
    device = samples.real.device

    def drawn(of: int) -> Tensor:
        return torch.randint(of, (of, number), generator=generator).to(device)

    runs, seeds, baseline_seeds = (drawn(len(each)) for each in (samples.baseline, samples.real, samples.real_baseline))
    queries, removals = samples.real.shape[1:]
    rows = drawn(removals).T[:, None].expand(number, queries, removals)
    predicted = samples.predicted_influence(difference, runs).gather(-1, rows)
    real = samples.real_influence(difference, seeds, baseline_seeds).gather(-1, rows)
    return correlations(predicted, real, correlation)
