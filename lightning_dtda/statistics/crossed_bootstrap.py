"""Confidence intervals of a score, by drawing again everything that it depends on by chance."""

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
"""Numbers that are drawn at a time: 8 MiB in double precision, which a cache holds; more at a time is slower."""

_SHORT_OF_ONE = 1e-9
"""Fisher's z of a perfect correlation is infinite; this far from it, z is 10.7, beyond what samples can tell apart."""


@dataclass(frozen=True, eq=False)
class Draws:
    """What is drawn again, with replacement, each time in one column.

    Args:
        removals: Positions ``(removals, number)``.
        runs: Positions ``(runs, number)``.
        seeds: Positions ``(seeds, number)``.
        baseline_seeds: Positions ``(baseline seeds, number)``.
        queries: From these, uniform between 0 and 1, queries are drawn ``(queries, number)``.
    """

    removals: Tensor
    runs: Tensor
    seeds: Tensor
    baseline_seeds: Tensor
    queries: Tensor

    @classmethod
    def of(cls, samples: Samples, number: int, seed: int, runs: Sequence[str] | None = None) -> Draws:
        """Draw from samples.

        Two predictions that are compared with the same truth have the same draws of it, and of the runs where these are
        the same; of other runs, draws that are independent.

        Args:
            samples: The samples.
            number: How many times.
            seed: Of the draws.
            runs: What the runs are called; ``None`` if all predictions are of the same.
        """
        of_truth, of_runs = torch.Generator().manual_seed(seed), torch.Generator()
        of_runs.manual_seed(seed + 1 + zlib.crc32("\n".join(runs or ()).encode()))

        def drawn(of: int, generator: torch.Generator = of_truth) -> Tensor:
            return positions(of, number, generator).T.contiguous().to(samples.real.device)

        queries, removals = samples.real.shape[1:]
        return cls(
            removals=drawn(removals),
            runs=drawn(len(samples.baseline), of_runs),
            seeds=drawn(len(samples.real)),
            baseline_seeds=drawn(len(samples.real_baseline)),
            queries=torch.rand(queries, number, generator=of_truth, dtype=torch.float64).to(samples.real.device),
        )


@dataclass(frozen=True, eq=False)
class Replicates:
    """A score's correlations in samples that are drawn again, and from which queries they are.

    Args:
        correlations: Of each query ``(number, queries)``.
        of_queries: The same in the samples themselves ``(queries,)``; those that are NaN do not count.
        queries: As in :class:`Draws` ``(queries, number)``.
    """

    correlations: Tensor
    of_queries: Tensor
    queries: Tensor

    @property
    def score(self) -> Tensor:
        """The score in the samples ``()``."""
        return self.of_queries.nanmean()

    def means(self) -> Tensor:
        """Return the score in each draw of removals, runs and seeds, of the queries as they are ``(number,)``."""
        return self.correlations.nanmean(1)

    def less(self, other: Replicates) -> Replicates:
        """Return the difference, query by query, to another prediction of the same truth."""
        return Replicates(self.correlations - other.correlations, self.of_queries - other.of_queries, self.queries)

    def scores(self) -> Tensor:
        r"""Return the score in each draw, of queries too ``(number,)``.

        Drawn are the removals, the recorded runs (X and Y of a run together), and the seeds of the truth, those of all
        removals together: what removals have in common, of one seed or of one query, stays in common. Then queries are
        drawn. A query's correlation :math:`\rho_q` is uncertain by its removals, runs and seeds, and drawing it would
        count that a second time; so its distance from the mean is shrunk to what lies between queries. With the
        variance :math:`\hat\tau^2` between the :math:`\rho_q`, of which :math:`\hat\sigma^2` is by their own
        uncertainty,

        .. math:: \mathrm{score}^*_b = \frac1Q \sum_q \rho^*_{b,q} + \frac{f}{Q} \sum_q (\rho_{q_b} - \bar\rho),
            \qquad f^2 = \max(0, 1 - \hat\sigma^2 / \hat\tau^2)\, \frac{Q}{Q - 1}

        (the moment estimator of DerSimonian and Laird, *Meta-analysis in Clinical Trials*, 1986, for equal weights).
        """
        return self.means() + self.deviations()

    def deviations(self) -> Tensor:
        """Return by how much drawn queries change the score, beyond what is drawn in each of them ``(number,)``."""
        known = ~self.of_queries.isnan()
        queries = int(known.sum())
        if queries < 2:
            return torch.zeros_like(self.queries[0])
        apart = self.of_queries[known] - self.score
        between = apart.square().sum() / (queries - 1)
        own = (self.correlations - self.means()[:, None])[:, known]
        within = (own - own.nanmean(0)).square().nanmean() * queries / (queries - 1)
        # where all queries are alike, 0 / 0 is no variance between them
        shrunk = (1 - within / between).nan_to_num(0).clamp_min(0) * queries / (queries - 1)
        chosen = (self.queries[:queries] * queries).long().T
        return shrunk.sqrt() * apart[chosen].mean(1)


def replicate(
    samples: Samples, difference: Difference, of_queries: Tensor, correlation: Correlation, draws: Draws
) -> Replicates:
    """Return the correlations of each query in samples that are drawn again.

    Args:
        samples: The samples.
        difference: The difference.
        of_queries: Correlation of each query in the samples ``(queries,)``; those that are NaN do not count.
        correlation: ``"spearman"`` or ``"pearson"``.
        draws: What is drawn.
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
    of_replicates = _fisher(replicates[~replicates.isnan()])
    below, above = _middle(of_replicates - of_replicates.mean(), confidence)
    return (_fisher(score) - above).tanh(), (_fisher(score) - below).tanh()


def difference_interval(first: Replicates, second: Replicates, confidence: float = 0.95) -> tuple[Tensor, Tensor]:
    r"""Return the limits of the interval for how much higher the first score is than the second, on average.

    Both are compared with one truth, and drawn again together; what they share cancels. With the :math:`\zeta^*_b` of
    each score, in draws of removals, runs and seeds, around their mean as for :func:`confidence_interval`, and the part
    :math:`\kappa_b` of the drawn queries that belongs to the difference, the difference is taken to lie where

    .. math:: \tanh\left(\zeta_1 - \zeta^*_{1b} + \overline{\zeta^*_1}\right)
        - \tanh\left(\zeta_2 - \zeta^*_{2b} + \overline{\zeta^*_2}\right) - \kappa_b

    does, between its quantiles.

    Args:
        first: Of one prediction.
        second: Of another one, with the same draws of the truth.
        confidence: How often the interval covers the expected difference.

    Returns:
        Lower and upper limit; NaN where there is no replicate.
    """
    means = [each.means() for each in (first, second)]
    known = ~(means[0].isnan() | means[1].isnan())
    expected = []
    for each, of_draws in zip((first, second), means, strict=True):
        around = _fisher(of_draws[known])
        expected.append((_fisher(each.score) - around + around.mean()).tanh())
    return _middle(expected[0] - expected[1] - first.less(second).deviations()[known], confidence)


def _middle(values: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Return the limits between which a share of values lies, with as many below as above; NaN without any."""
    if not len(values):
        return values.new_full((), torch.nan), values.new_full((), torch.nan)
    low, high = values.quantile(values.new_tensor([(1 - share) / 2, (1 + share) / 2]))
    return low, high


def _fisher(correlation: Tensor) -> Tensor:
    return correlation.clamp(_SHORT_OF_ONE - 1, 1 - _SHORT_OF_ONE).atanh()
