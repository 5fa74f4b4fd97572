"""The examples, or groups, with the largest influences on a query, each with its uncertainty."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_dtda.attribution.attribution import Attribution
from lightning_dtda.attribution.predicting import share_outside
from lightning_dtda.errors import AttributionError
from lightning_dtda.reporting.certainty import Tested, intervals, retrainings, samples, tested
from lightning_dtda.statistics.differences import DIFFERENCES, Difference, resolve_difference


@dataclass(frozen=True)
class TopExample:
    """An example, or a group, with a large influence on a query: a row of ``Attribution.top`` with its uncertainty.

    Influences are as they are shown: those of a relative difference, such as the spread, in percent.

    Args:
        rank: Rank, from 1 for the largest.
        position: The example's index, or the group's position.
        name: The example's index, or the group's name.
        size: Number of examples.
        influence: Influence, the change of the property if it is removed.
        standard_error: Standard error of the influence.
        mean_influence: Change of the mean if removed.
        spread_influence: Change of the standard deviation if removed, in percent; NaN with a single run.
        out_of_range: Share of runs in which the measurement is predicted where it cannot be.
        interval_low: Lower end of the influence's interval over seeds; NaN if there is none.
        interval_high: Upper end of the interval.
        p_value: p-value of no effect; NaN with too few runs.
        q_value: Smallest false discovery rate at which it is significant among all removals.
        significant: Whether it is significant among all removals, at a false discovery rate of
            :data:`~lightning_dtda.reporting.certainty.FDR`.
        retrainings_low: Lower end of the number of retrainings without it, and as large a number with all data, that
            would show the effect; NaN with too few runs, or if the difference cannot be planned by.
        retrainings_high: Upper end, infinite if there may be no effect.
    """

    rank: int
    position: int
    name: str
    size: int
    influence: float
    standard_error: float
    mean_influence: float
    spread_influence: float
    out_of_range: float
    interval_low: float
    interval_high: float
    p_value: float
    q_value: float
    significant: bool
    retrainings_low: float
    retrainings_high: float


def significance_on(attribution: Attribution, query: int, difference: str | Difference) -> Tested:
    """Return the tests of every removal's influence on the query at a position, over the trusted runs."""
    return tested(attribution.trusted().select([query]), difference)


def top_examples(
    attribution: Attribution,
    query: int,
    difference: str | Difference,
    k: int,
    tests: Tested | None = None,
    listed: int | None = None,
) -> list[TopExample]:
    """Return the k examples, or groups, with the largest absolute influence on the query at a position.

    Args:
        attribution: The attribution; only its trusted runs are used.
        query: Position of the query.
        difference: Difference to rank by.
        k: Number of examples or groups, at most :attr:`Attribution.most_listed`.
        tests: Result of :func:`significance_on`; ``None`` computes it.
        listed: Number of rows in all. Beyond the k largest, significant ones come before larger ones that are not;
            all are in the order of their size. ``None`` means k.

    Raises:
        AttributionError: If ``k`` is less than one.
    """
    if k < 1:
        raise AttributionError(f"k={k}; give the number of removals to show, at least 1.")
    selected, chosen = attribution.trusted().select([query]), resolve_difference(difference)
    tests = tested(selected, chosen) if tests is None else tests
    if not tests.possible and len(selected.runs) < chosen.least_runs:
        selected._difference(chosen)  # raises
    order = tests.influence.abs().nan_to_num(-1).argsort(descending=True)[: selected.most_listed]
    ranks = _ranks_listed(tests.significant[order], k, max(k, listed or 0))
    shown = order[ranks].tolist()
    of_query, predicted = samples(selected, shown)
    unknown = torch.full((2, len(shown)), torch.nan)
    several = len(selected.runs) > 1
    errors = chosen.standard_error(of_query, predicted)
    columns = {
        "influence": chosen(of_query, predicted),
        "standard_error": errors * 100 * tests.influence[shown].exp() if chosen.relative else errors,
        "mean_influence": DIFFERENCES["mean"](of_query, predicted),
        "spread_influence": DIFFERENCES["spread"](of_query, predicted) if several else unknown[0],
        "out_of_range": share_outside(selected, predicted),
        "p_value": tests.p_values[shown],
        "q_value": tests.q_values[shown],
        "significant": tests.significant[shown],
    }
    columns["interval_low"], columns["interval_high"] = intervals(selected, chosen, shown)
    columns["retrainings_low"], columns["retrainings_high"] = retrainings(selected, chosen, shown)
    shown_as = dict.fromkeys(("influence", "interval_low", "interval_high"), chosen.shown)
    shown_as["spread_influence"] = DIFFERENCES["spread"].shown
    figures = [[shown_as.get(name, _as_it_is)(each) for each in column.tolist()] for name, column in columns.items()]
    names, members = attribution.removals, attribution.members
    return [
        TopExample(
            rank=rank,
            position=position,
            name=str(position) if names is None else names[position],
            size=1 if members is None else len(members[position]),
            **dict(zip(columns, row, strict=True)),
        )
        for rank, position, row in zip((ranks + 1).tolist(), shown, zip(*figures, strict=True), strict=True)
    ]


def _ranks_listed(significant: Tensor, k: int, listed: int) -> Tensor:
    """Return the ranks, from 0, of the first k, and of others up to a number, the significant ones first."""
    others = torch.arange(min(k, len(significant)), len(significant))
    others = others[significant[others].logical_not().to(torch.uint8).argsort(stable=True)][: listed - k]
    return torch.cat([torch.arange(min(k, len(significant))), others.sort().values])


def _as_it_is(value: Any) -> Any:
    return value
