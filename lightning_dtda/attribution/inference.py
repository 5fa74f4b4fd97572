"""What an attribution says about other seeds than those of its runs: intervals, tests, how many runs are needed.

Functions of an attribution, and methods of :class:`~lightning_dtda.Attribution` by the same names.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from lightning_dtda.attribution.kept import MOMENTS, moment_of
from lightning_dtda.errors import AttributionError
from lightning_dtda.statistics import power as power_of
from lightning_dtda.statistics import reliability as ranking
from lightning_dtda.statistics import significance
from lightning_dtda.statistics.differences import Difference, resolve_difference
from lightning_dtda.statistics.intervals import bootstrap_interval

if TYPE_CHECKING:
    from lightning_dtda.attribution.attribution import Attribution

Runs = Literal["trusted", "all"]


def interval(
    attribution: Attribution,
    difference: str | Difference,
    level: float = 0.95,
    removed: Sequence[int | str] | None = None,
    runs: Runs = "trusted",
    replicates: int = 1000,
) -> Tensor:
    """Return a confidence interval over seeds of :meth:`Attribution.influence`, by the bootstrap.

    With few runs it is too narrow: an interval of 0.95 holds the mean influence in 0.87 of cases with 8 runs, in
    0.93 with 20. For distances, which are never negative, it is no test against zero; :func:`p_values` are. See
    :func:`~lightning_dtda.statistics.intervals.bootstrap_interval`.

    Args:
        attribution: The attribution.
        difference: As for :meth:`Attribution.influence`.
        level: Its confidence.
        removed: As for :meth:`Attribution.influence`. Of each removal on its own, the difference is computed
            ``replicates`` times.
        runs: As for :meth:`Attribution.influence`.
        replicates: Number of draws.

    Returns:
        ``(2, queries, removals)``, lower and upper end; ``(2, queries)`` for removals made together; float64.
        NaN for removals whose responses were not kept, see :meth:`Attribution.keep_top`.

    Raises:
        AttributionError: If the difference needs more runs, or the level is no share.
    """
    check_share(level, "level")
    if replicates < 2:
        raise AttributionError(f"replicates={replicates}; give the number of draws, at least 2 and rather 1000.")
    selected, chosen = attribution._selected(runs), resolve_difference(difference)
    selected._enough(chosen, max(chosen.least_runs, 1) + 1, "interval")
    ends = selected._each_query(
        partial(bootstrap_interval, chosen, level=level, replicates=replicates),
        removed,
        outputs=(2,),
        copies=1 + 4 * replicates // len(selected.runs),  # the replicates take more memory than the samples
        kept=True,
    )
    return ends.movedim(1, 0)


def p_values(
    attribution: Attribution,
    difference: str | Difference,
    removed: Sequence[int | str] | None = None,
    runs: Runs = "trusted",
) -> Tensor:
    """Return the probability, over seeds, of so clear an influence if removal had no effect.

    What is tested, and how, depends on the difference; see :mod:`lightning_dtda.statistics.significance`. The
    linear response is taken as given.

    Args:
        attribution: The attribution.
        difference: As for :meth:`Attribution.influence`.
        removed: As for :meth:`Attribution.influence`.
        runs: As for :meth:`Attribution.influence`.

    Returns:
        ``(queries, removals)``, or ``(queries,)`` for removals made together; float64.

    Raises:
        AttributionError: If the test needs more runs.
    """
    selected, chosen = attribution._selected(runs), resolve_difference(difference)
    selected._enough(chosen, significance.least_runs(chosen), "test")
    figures = selected._figures
    if removed is None and chosen.moments and figures is not None:
        return significance.of_any([figures.p_values(moment) for moment in chosen.moments])
    return selected._each_query(partial(significance.p_values, chosen), removed)


def significant(
    attribution: Attribution, difference: str | Difference, fdr: float = 0.05, runs: Runs = "trusted"
) -> Tensor:
    """Return which removals have an effect, for each query ``(queries, removals)``, bool.

    Of those that are named for a query, a share of ``fdr`` has none on average (Benjamini and Hochberg).

    Args:
        attribution: The attribution.
        difference: As for :meth:`Attribution.influence`.
        fdr: False discovery rate.
        runs: As for :meth:`Attribution.influence`.

    Raises:
        AttributionError: If the test needs more runs, or the rate is no share.
    """
    check_share(fdr, "fdr")
    return significance.discoveries(attribution.p_values(difference, runs=runs), fdr)


def runs_for_significance(
    attribution: Attribution,
    difference: str | Difference,
    fdr: float = 0.05,
    power: float = 0.8,
    runs: Runs = "trusted",
) -> Tensor:
    """Return with how many runs in all each removal would be :func:`significant`, if its effect is as it seems.

    Even if it were the only one: its p-value would be below ``fdr`` over the number of removals. The largest of
    many influences are overestimated, so for these it is a lower bound. See
    :func:`~lightning_dtda.statistics.power.runs_for_significance`.

    Args:
        attribution: The attribution.
        difference: As for :meth:`Attribution.influence`.
        fdr: As for :func:`significant`.
        power: Probability that so many runs are enough.
        runs: As for :meth:`Attribution.influence`.

    Returns:
        ``(queries, removals)``, float64; infinite without an effect.

    Raises:
        AttributionError: If the test needs more runs, or ``fdr`` or ``power`` is no share.
    """
    check_share(fdr, "fdr")
    check_share(power, "power")
    selected, chosen = attribution._selected(runs), resolve_difference(difference)
    level = fdr / attribution.responses.shape[2]
    return power_of.runs_for_significance(chosen, selected.p_values(chosen), len(selected.runs), level, power)


def retrainings_needed(
    attribution: Attribution,
    removed: Sequence[int | str] | None = None,
    difference: str | Difference = "mean",
    power: float = 0.8,
    alpha: float = 0.05,
    runs: Runs = "trusted",
) -> Tensor:
    """Return how many real retrainings, with and without examples, would show the predicted effect.

    So many with them and as many without, of fresh seeds; see
    :func:`~lightning_dtda.statistics.power.retrainings_needed`. The effect is taken as it is predicted, so for the
    largest of many influences, which are overestimated, it is a lower bound.

    Args:
        attribution: The attribution.
        removed: Removals that are made together; ``None`` is each on its own, which takes long for differences that
            are simulated, all but the mean and the variance.
        difference: As for :meth:`Attribution.influence`.
        power: Probability of finding the effect.
        alpha: Probability of finding one that is not there.
        runs: As for :meth:`Attribution.influence`.

    Returns:
        ``(queries, removals)``, or ``(queries,)`` for removals made together; float64, infinite without an effect,
        NaN for removals whose responses were not kept.

    Raises:
        AttributionError: If the difference needs more runs, or ``power`` or ``alpha`` is no share.
    """
    check_share(power, "power")
    check_share(alpha, "alpha")
    selected, chosen = attribution._selected(runs), resolve_difference(difference)
    selected._enough(chosen, max(2, chosen.least_runs), "number of seeds")
    return selected._each_query(
        partial(power_of.retrainings_needed, chosen, power=power, alpha=alpha), removed, kept=True
    )


def reliability(attribution: Attribution, difference: str | Difference = "mean", runs: Runs = "trusted") -> Tensor:
    """Return how well the runs agree about the ranking of the removals, for each query ``(queries,)``.

    1 where other seeds would rank them the same, 0 where the ranking is seed noise; where it is low, more runs
    help. See :func:`~lightning_dtda.statistics.reliability.reliability`.

    Raises:
        AttributionError: If there are too few runs to be halved.
    """
    selected, chosen = attribution._selected(runs), resolve_difference(difference)
    selected._enough(chosen, 2 * max(chosen.least_runs, 2), "reliability")
    moment, figures = moment_of(chosen), selected._figures
    if moment and figures is not None:
        return figures.reliability[:, MOMENTS.index(moment)]
    # query by query: the influences of all, of each half of the runs, take as much memory as the responses
    found = [
        ranking.reliability(partial(_of_runs, selected.select([query]), chosen), len(selected.runs))
        for query in range(len(selected.queries))
    ]
    return torch.cat(found)


def runs_for_stable_top(
    attribution: Attribution,
    difference: str | Difference = "mean",
    k: int = 10,
    agreement: float = 0.9,
    runs: Runs = "trusted",
) -> Tensor:
    """Return with how many runs in all the top k removals of each query would be stable.

    They are stable when two ensembles of that many runs would have a share of ``agreement`` of their top k in
    common, on average. It is extrapolated from what halves of the runs have in common; see
    :func:`~lightning_dtda.statistics.reliability.runs_for_stable_top`.

    Args:
        attribution: The attribution.
        difference: What to rank by, in absolute value.
        k: Number of removals at the top.
        agreement: The share.
        runs: As for :meth:`Attribution.influence`.

    Returns:
        ``(queries,)``, float64; infinite where halves have no more in common than by chance.

    Raises:
        AttributionError: If there are too few runs to be halved, or not more than k removals.
    """
    check_share(agreement, "agreement")
    removals = attribution.responses.shape[2]
    if not 1 <= k < removals:
        raise AttributionError(f"k={k}; give a number of removals from 1 to {removals - 1}, one less than all.")
    selected, chosen = attribution._selected(runs), resolve_difference(difference)
    selected._enough(chosen, 2 * max(chosen.least_runs, 2), "number of runs")
    half = len(selected.runs) // 2
    found = [
        ranking.top_agreement(partial(_of_runs, selected.select([query]), chosen), len(selected.runs), k)
        for query in range(len(selected.queries))
    ]
    return ranking.runs_for_stable_top(torch.cat(found), half, k, removals, agreement).clamp_min(chosen.least_runs)


def _of_runs(selected: Attribution, difference: Difference, positions: Tensor) -> Tensor:
    return selected._of(positions.tolist())._influence(difference)


def check_share(value: float, name: str) -> None:
    """Refuse what is no share.

    Raises:
        AttributionError: If it is not between 0 and 1.
    """
    if not 0 < value < 1:
        raise AttributionError(f"{name}={value}; give a share between 0 and 1.")
