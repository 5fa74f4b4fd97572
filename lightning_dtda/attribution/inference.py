"""Inference from the runs of an attribution to other seeds: intervals, tests, numbers of runs needed.

Functions of an attribution, and methods of :class:`~lightning_dtda.Attribution` by the same names.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from lightning_dtda.attribution.kept import KNOWN, known_as
from lightning_dtda.attribution.responses import in_parts
from lightning_dtda.errors import AttributionError
from lightning_dtda.statistics import power as power_of
from lightning_dtda.statistics import reliability as ranking
from lightning_dtda.statistics import significance
from lightning_dtda.statistics.differences import Difference, Inference
from lightning_dtda.statistics.moments import Pairs
from lightning_dtda.statistics.power import Needed

if TYPE_CHECKING:
    from lightning_dtda.attribution.attribution import Attribution

Runs = Literal["trusted", "all"]


def interval(
    attribution: Attribution,
    difference: str | Difference,
    level: float = 0.95,
    removed: Sequence[int | str] | None = None,
    runs: Runs = "trusted",
) -> Tensor:
    """Return a confidence interval over seeds of :meth:`Attribution.influence`.

    It excludes zero if and only if :func:`p_values` is below ``1 - level``. It takes the linear response as given. See
    :meth:`Difference.interval <lightning_dtda.statistics.Difference.interval>`.

    Args:
        attribution: The attribution.
        difference: As for :meth:`Attribution.influence`.
        level: Confidence level.
        removed: As for :meth:`Attribution.influence`.
        runs: As for :meth:`Attribution.influence`.

    Returns:
        Lower and upper ends ``(2, queries, removals)``, or ``(2, queries)`` for removals made together; float64.
        NaN where the influence is NaN; for other differences than mean and spread also for removals whose responses
        were not kept, see :meth:`Attribution.keep_top`.

    Raises:
        AttributionError: If the difference needs more runs or has no interval, or the level is not between 0 and 1.
    """
    check_share(level, "level")
    selected = attribution._selected(runs)
    chosen = selected._resolved(difference, infers=True)
    if reason := chosen.no_interval(len(selected.runs)):
        raise AttributionError(f"The {chosen.name} influence has no interval: {reason}")
    figures = selected._figures
    if removed is None and figures is not None and known_as(chosen):
        return figures.inference(chosen, level)[3:]
    # an estimate, its standard error, both ends and what they are computed from
    return selected._each_query(partial(chosen.interval, level=level), removed, outputs=(2,), copies=4, kept=True)


def p_values(
    attribution: Attribution,
    difference: str | Difference,
    removed: Sequence[int | str] | None = None,
    runs: Runs = "trusted",
) -> Tensor:
    """Return the probability, over seeds, of an influence at least this clear if the removal had no effect.

    The test depends on the difference; see :meth:`Difference.p_values
    <lightning_dtda.statistics.Difference.p_values>`. It takes the linear response as given.

    Args:
        attribution: The attribution.
        difference: As for :meth:`Attribution.influence`.
        removed: As for :meth:`Attribution.influence`.
        runs: As for :meth:`Attribution.influence`.

    Returns:
        p-values ``(queries, removals)``, or ``(queries,)`` for removals made together; float64.

    Raises:
        AttributionError: If the test needs more runs.
    """
    selected = attribution._selected(runs)
    chosen = selected._resolved(difference, infers=True)
    selected._enough(chosen, chosen.least_runs_to_test, "test")
    figures = selected._figures
    if removed is None and chosen.moments and figures is not None:
        return figures.p_values(chosen.moments)
    return selected._each_query(chosen.p_values, removed, copies=8)


def inferences(
    attribution: Attribution, differences: Sequence[str | Difference], level: float = 0.95, runs: Runs = "trusted"
) -> list[Inference]:
    """Return influence, standard error, p-values and interval of every removal, all in one pass over the responses.

    For each difference. It is faster than :meth:`Attribution.influence`, :meth:`Attribution.standard_error`,
    :func:`p_values` and :func:`interval` in turn, and has NaN where these raise an error: where there are too few runs,
    or no interval, and for removals whose responses were not kept.

    Args:
        attribution: The attribution.
        differences: Differences, each as for :meth:`Attribution.influence`.
        level: Confidence level of the intervals.
        runs: As for :meth:`Attribution.influence`.

    Returns:
        Each part ``(queries, removals)``, the interval ``(2, queries, removals)``; float64.

    Raises:
        AttributionError: If the level is not between 0 and 1.
    """
    check_share(level, "level")
    selected = attribution._selected(runs)
    chosen = [selected._resolved(each, infers=True) for each in differences]
    number, figures = len(selected.runs), selected._figures
    names = [None if figures is None else known_as(each) for each in chosen]
    computed = [e for e, name in zip(chosen, names, strict=True) if name is None and number >= e.least_runs]

    def stacked(baseline: Tensor, predicted: Tensor) -> Tensor:
        pairs = Pairs(baseline, predicted)
        found = (each.inference(pairs, level) for each in computed)
        return torch.stack([part for estimate, error, p, ends in found for part in (estimate, error, p, *ends)])

    parts: Iterator[Tensor] = iter(())
    if computed:
        parts = iter(selected._each_query(stacked, None, (5 * len(computed),), copies=8, kept=True).split(5))
    found = []
    for each, name in zip(chosen, names, strict=True):
        if number < each.least_runs:
            one = torch.full((5, *selected.responses.shape[1:]), torch.nan, dtype=torch.float64)
        elif figures is not None and name is not None:
            one = figures.inference(each, level)
        else:
            one = next(parts)
            if figures is not None and each.moments and number >= each.least_runs_to_test:
                one[2] = figures.p_values(each.moments)
        found.append(Inference(one[0], one[1], one[2], one[3:]))
    return found


def significant(
    attribution: Attribution, difference: str | Difference, fdr: float = 0.05, runs: Runs = "trusted"
) -> Tensor:
    """Return which removals have a significant influence on each query ``(queries, removals)``, bool.

    On average, a share of at most ``fdr`` of those found for a query has no effect (Benjamini and Hochberg).

    Args:
        attribution: The attribution.
        difference: As for :meth:`Attribution.influence`.
        fdr: False discovery rate.
        runs: As for :meth:`Attribution.influence`.

    Raises:
        AttributionError: If the test needs more runs, or ``fdr`` is not between 0 and 1.
    """
    check_share(fdr, "fdr")
    return significance.discoveries(attribution.p_values(difference, runs=runs), fdr)


def runs_for_significance(
    attribution: Attribution,
    difference: str | Difference,
    fdr: float = 0.05,
    power: float = 0.8,
    runs: Runs = "trusted",
    level: float = 0.8,
) -> Needed:
    """Return the total number of runs at which each removal would be :func:`significant`, as a range.

    It would be so even if it were the only significant one: its p-value would be below ``fdr`` divided by the number of
    removals. The ranges of all removals on a query hold together, with a confidence of ``level``, so also that of the
    removal that looks clearest. Where a removal may have no effect at all, there is no upper end. See
    :func:`~lightning_dtda.statistics.power.runs_for_significance`.

    Args:
        attribution: The attribution.
        difference: As for :meth:`Attribution.influence`.
        fdr: As for :func:`significant`.
        power: Probability that this number of runs is enough.
        runs: As for :meth:`Attribution.influence`.
        level: Confidence level of the ranges.

    Returns:
        Numbers of runs ``low``, ``estimate`` and ``high``, each ``(queries, removals)``, float64; infinite without an
        effect.

    Raises:
        AttributionError: If the test needs more runs, or ``fdr``, ``power`` or ``level`` is not between 0 and 1.
    """
    for value, name in ((fdr, "fdr"), (power, "power"), (level, "level")):
        check_share(value, name)
    selected = attribution._selected(runs)
    chosen = selected._resolved(difference, infers=True)
    _refuse_crossed(chosen, "number of runs for significance")
    removals, p = attribution.responses.shape[2], selected.p_values(chosen)
    together = 1 - (1 - level) / removals
    return Needed(
        *power_of.runs_for_significance(chosen, p, len(selected.runs), fdr / removals, power, together).unbind()
    )


def retrainings_needed(
    attribution: Attribution,
    removed: Sequence[int | str] | None = None,
    difference: str | Difference = "mean",
    power: float = 0.8,
    alpha: float = 0.05,
    runs: Runs = "trusted",
    level: float = 0.8,
) -> Needed:
    """Return the number of actual retrainings that would show the predicted effect, as a range.

    The experiment takes this number of retrainings with the examples, and the same number without them, all with new
    seeds; see :func:`~lightning_dtda.statistics.power.retrainings_needed`. The ranges of all removals on a query hold
    together, with a confidence of ``level``, so also that of the removal that looks clearest. They take the linear
    response as given.

    Args:
        attribution: The attribution.
        removed: Removals that are made together; ``None`` means each on its own.
        difference: As for :meth:`Attribution.influence`.
        power: Probability of finding the effect.
        alpha: Probability of finding an effect if there is none.
        runs: As for :meth:`Attribution.influence`.
        level: Confidence level of the ranges.

    Returns:
        Numbers of retrainings ``low``, ``estimate`` and ``high``, each ``(queries, removals)``, or ``(queries,)`` for
        removals made together; float64. Infinite without an effect, NaN for removals whose responses were not kept.

    Raises:
        AttributionError: If the difference needs more runs or cannot be planned by, or ``power``, ``alpha`` or
            ``level`` is not between 0 and 1.
    """
    for value, name in ((power, "power"), (alpha, "alpha"), (level, "level")):
        check_share(value, name)
    selected = attribution._selected(runs)
    chosen = selected._resolved(difference, infers=True)
    _refuse_crossed(chosen, "number of retrainings")
    selected._enough(chosen, chosen.least_runs_to_test, "number of retrainings")
    if not power_of.can_be_planned(chosen, len(selected.runs)):
        raise AttributionError(
            f"Retrainings cannot be planned by the {chosen.name} influence: there is no standard error that holds for "
            'new seeds. Give difference="mean" or "spread".'
        )
    together = level if removed is not None else 1 - (1 - level) / attribution.responses.shape[2]
    numbers = selected._each_query(
        partial(power_of.retrainings_needed, chosen, power=power, alpha=alpha, level=together),
        removed,
        outputs=(3,),
        copies=4 * len(selected.runs),  # the runs but one, of X and of Y, for each run
        kept=True,
    )
    return Needed(*numbers.unbind())


def reliability(attribution: Attribution, difference: str | Difference = "mean", runs: Runs = "trusted") -> Tensor:
    """Return how well the runs agree on the ranking of the removals, for each query ``(queries,)``.

    1: other seeds would give the same ranking. 0: the ranking is seed noise. If it is low, record more runs. See
    :func:`~lightning_dtda.statistics.reliability.reliability`.

    Raises:
        AttributionError: If there are too few runs to split into halves.
    """
    selected = attribution._selected(runs)
    chosen = selected._resolved(difference, infers=True)
    _refuse_crossed(chosen, "reliability")
    selected._enough(chosen, 2 * max(chosen.least_runs, 2), "reliability")
    figures = selected._figures
    if figures is not None and (name := known_as(chosen)):
        return figures.reliability[:, KNOWN.index(name)]
    # query by query: influences of all queries, for each half of the runs, take as much memory as the responses
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
    """Return the total number of runs at which the top k removals of each query would be stable.

    They are stable if two ensembles of this size have a share of ``agreement`` of their top k in common, on average.
    The number is extrapolated from the overlap between halves of the runs; see
    :func:`~lightning_dtda.statistics.reliability.runs_for_stable_top`.

    Args:
        attribution: The attribution.
        difference: Difference to rank by, in absolute value.
        k: Number of removals at the top.
        agreement: Share of the top k in common.
        runs: As for :meth:`Attribution.influence`.

    Returns:
        Numbers of runs ``(queries,)``, float64; infinite if halves have no more in common than by chance.

    Raises:
        AttributionError: If there are too few runs to split into halves, or k is not less than the number of removals.
    """
    check_share(agreement, "agreement")
    removals = attribution.responses.shape[2]
    if not 1 <= k < removals:
        raise AttributionError(f"k={k}; give a number from 1 to {removals - 1}, less than the number of removals.")
    selected = attribution._selected(runs)
    chosen = selected._resolved(difference, infers=True)
    _refuse_crossed(chosen, "number of runs for a stable top")
    selected._enough(chosen, 2 * max(chosen.least_runs, 2), "number of runs")
    half = len(selected.runs) // 2
    found = [
        ranking.top_agreement(partial(_of_runs, selected.select([query]), chosen), len(selected.runs), k)
        for query in range(len(selected.queries))
    ]
    return ranking.runs_for_stable_top(torch.cat(found), half, k, removals, agreement).clamp_min(chosen.least_runs)


def _refuse_crossed(difference: Difference, what: str) -> None:
    """Refuse what depends on the number of runs, where precision grows with the seeds of each source.

    Raises:
        AttributionError: If the difference is one of crossed runs.
    """
    if difference.crossed:
        instead = (
            "Take the runs that share none: attribution.independent()."
            if difference.name == "mean"
            else "Its p-value says what these seeds show; with more seeds of each source it shows more."
        )
        raise AttributionError(
            f"The {difference.title} has no {what} here: it depends on the seeds of each source. {instead}"
        )


def _of_runs(selected: Attribution, difference: Difference, positions: Tensor) -> Tensor:
    """Return the influences over some runs on the only query ``(1, removals)``."""
    baseline, responses = selected.baseline[positions], selected.responses[positions]
    found = torch.empty(responses.shape[1:], dtype=torch.float64, device=responses.device)
    in_parts(difference, baseline, responses, slice(None), found, selected.scale)
    return found


def check_share(value: float, name: str) -> None:
    """Check that a value is a share between 0 and 1.

    Raises:
        AttributionError: If the value is not between 0 and 1.
    """
    if not 0 < value < 1:
        raise AttributionError(f"{name}={value}; give a share between 0 and 1.")
