"""Agreement between predicted influences of removals and those found by retraining."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_dtda.errors import AttributionError
from lightning_dtda.statistics.correlation import Correlation, correlations, is_constant
from lightning_dtda.statistics.crossed_bootstrap import Replicates, Resamples, confidence_interval, replicate
from lightning_dtda.statistics.differences import Difference, resolve_difference
from lightning_dtda.statistics.noise_ceiling import noise_ceiling
from lightning_dtda.statistics.samples import Samples, arrange, check_samples, collect

REPLICATES = 500
"""Number of bootstrap draws: 12 of them lie beyond each limit of a 95 % interval."""


def linear_datamodeling_score(
    predicted: Tensor,
    baseline: Tensor,
    real: Tensor,
    real_baseline: Tensor,
    difference: str | Difference = "mean",
    *,
    paired: bool = False,
    replicates: int = REPLICATES,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Tensor]:
    r"""Compute the distributional linear datamodeling score (LDS).

    .. math::
        \mathrm{LDS} = \frac1Q \sum_q \rho\left(
            \bigl(\Delta(X_q, \hat Y_{k,q})\bigr)_k,\; \bigl(\Delta(X'_q, Y'_{k,q})\bigr)_k \right)

    :math:`\rho` is Spearman's correlation over subsets k of removed examples. X and :math:`\hat Y` are the measurements
    of recorded runs and their predictions without subset k; X' and Y' are the measurements of models retrained with and
    without it. With the mean difference, this is the usual LDS (Park et al., *TRAK*, arXiv 2303.14186, section 2); with
    others, it is the distributional LDS (Mlodozeniec et al., arXiv 2506.12965, section 5).

    Args:
        predicted: Samples of :math:`\hat Y` ``(subsets, runs, queries)``.
        baseline: Samples of X from the same runs ``(runs, queries)``.
        real: Samples of Y' ``(subsets, seeds, queries)``.
        real_baseline: Samples of X' ``(baseline seeds, queries)``; their number may differ from that of the seeds.
        difference: ``mean``, ``variance``, ``wasserstein``, the import path of a class, or a
            :class:`~lightning_dtda.statistics.differences.Difference`.
        paired: Whether seed i of ``real_baseline`` is the same as seed i of ``real``. If so, they are halved and drawn
            together.
        replicates: Number of bootstrap draws; 0 skips the interval.
        confidence: Confidence level of the interval.
        seed: Seed of the bootstrap draws.

    Returns:
        Tensors by name, float64, or int64 for counts:

        - ``score``: the LDS;
        - ``low``, ``high``: its interval over queries, subsets, runs and seeds,
          see :func:`~lightning_dtda.statistics.crossed_bootstrap.confidence_interval`;
        - ``per_query``: the correlation of each query ``(queries,)``. It is NaN where the real influence is the same
          for all subsets, and such queries do not count; it is 0 where only the predicted influence is constant;
        - ``split_half``, ``reliability``, ``ceiling``: limits set by the noise of the truth,
          see :func:`~lightning_dtda.statistics.noise_ceiling.noise_ceiling`; NaN with fewer than 4 seeds or
          baseline seeds;
        - ``subsets``, ``runs``, ``seeds``, ``baseline_seeds``, ``queries``: their numbers; ``constant_queries``: number
          of queries that do not count; ``constant_predictions``: number of other queries whose correlation is 0 because
          all predictions are the same.

    Raises:
        AttributionError: If shapes do not match, values are not finite, there are too few samples for the difference or
            fewer than two subsets, or no query has an influence that differs between subsets.

    Example:
        >>> truth = torch.tensor([1.0, 2.0, 3.0, 4.0])
        >>> predicted, real = truth[:, None, None].expand(4, 2, 1), truth[:, None, None].expand(4, 5, 1)
        >>> found = linear_datamodeling_score(predicted, torch.zeros(2, 1), real, torch.zeros(6, 1))
        >>> found["score"]
        tensor(1., dtype=torch.float64)
        >>> found["ceiling"]
        tensor(1., dtype=torch.float64)
    """
    samples = collect(arrange(predicted, baseline, real, real_baseline), paired)
    found, _ = agreement(samples, difference, "spearman", replicates, confidence, seed)
    return found


def leave_one_out_correlation(
    predicted: Tensor,
    baseline: Tensor,
    real: Tensor,
    real_baseline: Tensor,
    difference: str | Difference = "mean",
    correlation: Correlation = "pearson",
    *,
    paired: bool = False,
    replicates: int = REPLICATES,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Correlate predicted with real leave-one-out influences (Koh and Liang, arXiv 1703.04730).

    Like :func:`linear_datamodeling_score`, with one example in each subset. A single example moves a measurement by
    little compared with the noise between seeds, so look at the ceiling before the score.

    Args:
        predicted: Predicted samples without each example ``(examples, runs, queries)``.
        baseline: Samples of the same runs ``(runs, queries)``.
        real: Samples of models trained without each example ``(examples, seeds, queries)``.
        real_baseline: Samples of models trained on everything ``(baseline seeds, queries)``.
        difference: As for :func:`linear_datamodeling_score`.
        correlation: ``"pearson"``, in which large influences count most, or ``"spearman"``.
        paired: As for :func:`linear_datamodeling_score`.
        replicates: As for :func:`linear_datamodeling_score`.
        confidence: As for :func:`linear_datamodeling_score`.
        seed: As for :func:`linear_datamodeling_score`.

    Returns:
        The same as :func:`linear_datamodeling_score`; ``subsets`` is the number of examples.

    Raises:
        AttributionError: As for :func:`linear_datamodeling_score`.

    Example:
        >>> changes = torch.tensor([1.0, 2.0, 4.0])[:, None, None]
        >>> found = leave_one_out_correlation(changes, torch.zeros(1, 1), changes.square(), torch.zeros(1, 1))
        >>> found["score"]
        tensor(0.9897, dtype=torch.float64)
    """
    samples = collect(arrange(predicted, baseline, real, real_baseline), paired)
    found, _ = agreement(samples, difference, correlation, replicates, confidence, seed)
    return found


def agreement(
    samples: Samples,
    difference: str | Difference,
    correlation: Correlation,
    replicates: int,
    confidence: float,
    seed: int,
    runs: Sequence[str] | None = None,
) -> tuple[dict[str, Tensor], Replicates | None]:
    """Return the result of :func:`linear_datamodeling_score`, and the draws of its interval for comparisons.

    Args:
        samples: Predicted and real samples.
        difference: The difference.
        correlation: The correlation.
        replicates: Number of draws; with 0, the returned draws are ``None``.
        confidence: Confidence level of the interval.
        seed: Seed of the draws.
        runs: Names of the recorded runs, see
            :class:`~lightning_dtda.statistics.crossed_bootstrap.Resamples`.
    """
    chosen = resolve_difference(difference)
    check_samples(samples, chosen)
    predicted, real = samples.predicted_influence(chosen), samples.real_influence(chosen)
    of_queries = correlations(predicted, real, correlation)
    nothing_to_predict = of_queries.isnan()
    if nothing_to_predict.all():
        raise AttributionError(
            f"The real {chosen.name} influence is the same for all {real.shape[-1]} removals on every query, so there "
            "is no order to predict. Check that the models were retrained without the removed examples."
        )
    score = of_queries.nanmean()
    low = high = torch.full_like(score, torch.nan)
    drawn = None
    if replicates:
        draws = Resamples.of(samples, replicates, seed, runs)
        drawn = replicate(samples, chosen, of_queries, correlation, draws)
        low, high = confidence_interval(score, drawn.scores(), confidence)
    noise = noise_ceiling(samples, chosen, correlation)
    nothing_predicted = is_constant(predicted) & ~nothing_to_predict
    numbers = {
        "subsets": real.shape[-1],
        "runs": len(samples.baseline),
        "seeds": len(samples.real),
        "baseline_seeds": len(samples.real_baseline),
        "queries": len(of_queries),
        "constant_queries": int(nothing_to_predict.sum()),
        "constant_predictions": int(nothing_predicted.sum()),
    }
    found = {
        "score": score,
        "low": low,
        "high": high,
        "per_query": of_queries,
        "split_half": noise.split_half,
        "reliability": noise.reliability,
        "ceiling": noise.ceiling,
        **{name: torch.tensor(number, device=score.device) for name, number in numbers.items()},
    }
    return found, drawn
