"""Confidence intervals of a score, by resampling every source of randomness that it depends on."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_dtda.statistics.correlation import Correlation, correlations
from lightning_dtda.statistics.differences import Difference
from lightning_dtda.statistics.resampling import positions
from lightning_dtda.statistics.samples import Samples

_AT_ONCE = 2**20
"""Number of values drawn at a time: 8 MiB in double precision, which fits in a cache; larger chunks are slower."""

_SHORT_OF_ONE = 1e-9
"""Distance from a perfect correlation, where Fisher's z is infinite; z is 10.7 here, more than samples can resolve."""


@dataclass(frozen=True, eq=False)
class Resamples:
    """Positions drawn with replacement, one per column.

    Args:
        removals: Positions ``(removals, number)``.
        runs: Positions ``(runs, number)``.
        seeds: Positions ``(seeds, number)``.
        baseline_seeds: Positions ``(baseline seeds, number)``.
        queries: Uniform numbers between 0 and 1 that select the queries ``(queries, number)``.
    """

    removals: Tensor
    runs: Tensor
    seeds: Tensor
    baseline_seeds: Tensor
    queries: Tensor

    @classmethod
    def of(cls, samples: Samples, number: int, seed: int, runs: Sequence[str] | None = None) -> Resamples:
        """Draw from samples.

        Two predictions compared with the same truth get the same draws of the truth. They also get the same draws of
        the runs if the runs are the same, and independent ones otherwise. Runs that were repeated for the truth are
        drawn together with their repetitions.

        Args:
            samples: The samples.
            number: Number of draws.
            seed: Seed of the draws.
            runs: Names of the runs; ``None`` if all predictions use the same runs.
        """
        of_truth, of_runs = torch.Generator().manual_seed(seed), torch.Generator()
        of_runs.manual_seed(seed + 1 + zlib.crc32("\n".join(runs or ()).encode()))

        def drawn(of: int, generator: torch.Generator = of_truth) -> Tensor:
            return positions(of, number, generator).T.contiguous().to(samples.real.device)

        queries, removals = samples.real.shape[1:]
        of_removals, seeds = drawn(removals), drawn(len(samples.real))
        return cls(
            removals=of_removals,
            runs=seeds if samples.repeated else drawn(len(samples.baseline), of_runs),
            seeds=seeds,
            baseline_seeds=drawn(len(samples.real_baseline)),
            queries=torch.rand(queries, number, generator=of_truth, dtype=torch.float64).to(samples.real.device),
        )


@dataclass(frozen=True, eq=False)
class Replicates:
    """Correlations behind a score in resampled data, and the draws of the queries.

    Args:
        correlations: Correlation of each query in each draw ``(number, queries)``.
        of_queries: Correlation of each query in the samples themselves ``(queries,)``; NaN does not count.
        queries: As in :class:`Resamples` ``(queries, number)``.
    """

    correlations: Tensor
    of_queries: Tensor
    queries: Tensor

    @property
    def score(self) -> Tensor:
        """Score in the samples ``()``."""
        return self.of_queries.nanmean()

    def means(self) -> Tensor:
        """Return the score in each draw of removals, runs and seeds, with the queries unchanged ``(number,)``."""
        return self.correlations.nanmean(1)

    def less(self, other: Replicates) -> Replicates:
        """Return the difference from another prediction of the same truth, query by query."""
        return Replicates(self.correlations - other.correlations, self.of_queries - other.of_queries, self.queries)

    def scores(self) -> Tensor:
        r"""Return the score in each draw, with the queries drawn as well ``(number,)``.

        Each draw resamples the removals, the recorded runs (X and Y of a run together), and the seeds of the truth,
        jointly for all removals, so whatever removals share through a seed or a query stays shared. Queries are drawn
        on top. A query's correlation :math:`\rho_q` is already uncertain through its removals, runs and seeds, and
        drawing it directly would count that twice, so its distance from the mean is shrunk to the variation between
        queries. With the variance :math:`\hat\tau^2` between the :math:`\rho_q`, of which their own uncertainty
        accounts for :math:`\hat\sigma^2`,

        .. math:: \mathrm{score}^*_b = \frac1Q \sum_q \rho^*_{b,q} + \frac{f}{Q} \sum_q (\rho_{q_b} - \bar\rho),
            \qquad f^2 = \max(0, 1 - \hat\sigma^2 / \hat\tau^2)\, \frac{Q}{Q - 1}

        (the moment estimator of DerSimonian and Laird, *Meta-analysis in Clinical Trials*, 1986, for equal weights).
        """
        return self.means() + self.deviations()

    def deviations(self) -> Tensor:
        """Return how much drawing queries changes the score, beyond the draws within each query ``(number,)``."""
        known = ~self.of_queries.isnan()
        queries = int(known.sum())
        if queries < 2:
            return torch.zeros_like(self.queries[0])
        apart = self.of_queries[known] - self.score
        between = apart.square().sum() / (queries - 1)
        own = (self.correlations - self.means()[:, None])[:, known]
        within = (own - own.nanmean(0)).square().nanmean() * queries / (queries - 1)
        # 0 / 0 where all queries are alike: no variance between them
        shrunk = (1 - within / between).nan_to_num(0).clamp_min(0) * queries / (queries - 1)
        chosen = (self.queries[:queries] * queries).long().T
        return shrunk.sqrt() * apart[chosen].mean(1)


def replicate(
    samples: Samples, difference: Difference, of_queries: Tensor, correlation: Correlation, draws: Resamples
) -> Replicates:
    """Return the correlations of each query in resampled data.

    Args:
        samples: The samples.
        difference: The difference.
        of_queries: Correlation of each query in the samples ``(queries,)``; NaN does not count.
        correlation: ``"spearman"`` or ``"pearson"``.
        draws: The draws.
    """
    drawn = []
    size = max(1, _AT_ONCE // max(samples.real.numel(), samples.predicted.numel()))
    for start in range(0, draws.runs.shape[1], size):
        part = slice(start, start + size)
        rows = draws.removals[:, part].T[:, None].expand(-1, samples.real.shape[1], -1)
        predicted = samples.predicted_influence(difference, draws.runs[:, part]).gather(-1, rows)
        real = samples.real_influence(difference, draws.seeds[:, part], draws.baseline_seeds[:, part]).gather(-1, rows)
        drawn.append(correlations(predicted, real, correlation))
    return Replicates(torch.cat(drawn), of_queries, draws.queries)


def confidence_interval(score: Tensor, replicates: Tensor, confidence: float = 0.95) -> tuple[Tensor, Tensor]:
    r"""Return the confidence limits for the expected score over repetitions of the experiment.

    Let :math:`\zeta = \operatorname{artanh}` of the score (Fisher's z), and :math:`\zeta^*_b` that of its replicates.
    The distribution of :math:`\zeta` around its expectation is taken to be that of :math:`\zeta^*_b` around their mean:

    .. math:: \left[\tanh\left(\zeta - q_{1 - \alpha/2}\right),\; \tanh\left(\zeta - q_{\alpha/2}\right)\right],
        \qquad q \text{ the quantiles of } \zeta^*_b - \overline{\zeta^*} .

    Plain percentiles of the replicates would be wrong. Data drawn with replacement carry the noise of the experiment
    plus that of the draws, and noise lowers a correlation, so the replicates lie below the score as a whole. Around
    their mean, their spread is right. On the scale of Fisher's z it hardly depends on their location, and the limits
    stay between -1 and 1 (Davison and Hinkley, *Bootstrap Methods and their Application*, 1997, section 5.2). Because
    removals and seeds are crossed, the variation of single cells is counted more than once, which makes the interval
    somewhat too wide (Owen, *The pigeonhole bootstrap*, Annals of Applied Statistics 1, 2007).

    Args:
        score: The score ``()``.
        replicates: Scores of the resampled data ``(number,)``; NaN, from draws without a score, is ignored.
        confidence: Probability that the interval covers the expected score.

    Returns:
        Lower and upper limit; NaN if there are no replicates.
    """
    of_replicates = _fisher(replicates[~replicates.isnan()])
    below, above = _middle(of_replicates - of_replicates.mean(), confidence)
    return (_fisher(score) - above).tanh(), (_fisher(score) - below).tanh()


def difference_interval(first: Replicates, second: Replicates, confidence: float = 0.95) -> tuple[Tensor, Tensor]:
    r"""Return the confidence limits for the expected difference between two scores, first minus second.

    Both scores are compared with one truth and resampled together, so whatever they share cancels. The limits are the
    quantiles of

    .. math:: \tanh\left(\zeta_1 - \zeta^*_{1b} + \overline{\zeta^*_1}\right)
        - \tanh\left(\zeta_2 - \zeta^*_{2b} + \overline{\zeta^*_2}\right) - \kappa_b

    with the :math:`\zeta^*_b` of each score in draws of removals, runs and seeds, as in :func:`confidence_interval`,
    and :math:`\kappa_b` the contribution of the drawn queries to the difference.

    Args:
        first: Replicates of one prediction.
        second: Replicates of another, with the same draws of the truth.
        confidence: Probability that the interval covers the expected difference.

    Returns:
        Lower and upper limit; NaN if there are no replicates.
    """
    means = [each.means() for each in (first, second)]
    known = ~(means[0].isnan() | means[1].isnan())
    expected = []
    for each, of_draws in zip((first, second), means, strict=True):
        around = _fisher(of_draws[known])
        expected.append((_fisher(each.score) - around + around.mean()).tanh())
    return _middle(expected[0] - expected[1] - first.less(second).deviations()[known], confidence)


def _middle(values: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Return the limits of the central share of the values; NaN if there are no values."""
    if not len(values):
        return values.new_full((), torch.nan), values.new_full((), torch.nan)
    low, high = values.quantile(values.new_tensor([(1 - share) / 2, (1 + share) / 2]))
    return low, high


def _fisher(correlation: Tensor) -> Tensor:
    return correlation.clamp(_SHORT_OF_ONE - 1, 1 - _SHORT_OF_ONE).atanh()
