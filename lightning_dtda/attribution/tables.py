"""An attribution as tables: the top removals, data sets with named dimensions, data frames.

Functions of an attribution, and methods of :class:`~lightning_dtda.Attribution` by the same names.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_dtda.attribution.inference import Runs
from lightning_dtda.attribution.kept import KNOWN, KeptResponses, known_as
from lightning_dtda.attribution.predicting import share_outside
from lightning_dtda.attribution.sources import seeds_of, sharing_a_seed
from lightning_dtda.errors import AttributionError
from lightning_dtda.statistics.differences import BY_SOURCE, DIFFERENCES, SHOWN, Difference, SourceVariance
from lightning_dtda.statistics.samples import as_array

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

    from lightning_dtda.attribution.attribution import Attribution


def available_differences(attribution: Attribution) -> list[str]:
    """Return :attr:`Attribution.available_differences`."""
    if sharing_a_seed(attribution):
        seeds = seeds_of(attribution.trusted())
        parts = [name for name in SourceVariance.names(seeds) if name in BY_SOURCE]
        mean = DIFFERENCES["mean"].of_runs(seeds)
        return ["mean", *parts] if mean.crossed and not isinstance(attribution.responses, KeptResponses) else parts
    runs = len(attribution.runs) - len(attribution.chaotic)
    known = KNOWN if isinstance(attribution.responses, KeptResponses) else SHOWN
    return [name for name in SHOWN if name in known and runs >= DIFFERENCES[name].least_runs]


def top(
    attribution: Attribution,
    k: int = 10,
    difference: str | Difference = "mean",
    query: int | None = None,
    runs: Runs = "trusted",
) -> pd.DataFrame:
    """Return the removals with the largest absolute influence on each query.

    Args:
        attribution: The attribution.
        k: Number of removals for each query.
        difference: Difference to rank by.
        query: Position of a query; ``None`` means all.
        runs: As for :meth:`Attribution.influence`.

    Returns:
        One row for each query and rank, with ``query``, ``rank`` (from 1), ``example`` (for groups ``removal``, the
        name, and ``size``, the number of examples), ``influence``, ``standard_error``, ``mean_influence``,
        ``spread_influence`` (NaN with a single run) and ``out_of_range``, as :meth:`Attribution.out_of_range`.

    Raises:
        AttributionError: If the difference needs more runs, the query does not exist, ``k`` is less than 1, or larger
            than the ``keep_top`` that was used.
    """
    import pandas as pd

    if k < 1:
        raise AttributionError(f"k={k}; give the number of removals to list, at least 1.")
    if attribution.most_listed < min(k, attribution.responses.shape[2]):
        raise AttributionError(
            f"k={k} is more than keep_top={attribution.most_listed}, the number that was kept. Give a smaller k, or "
            "use to_dataframe, which has the mean, variance and spread influence of every removal."
        )
    positions = range(len(attribution.queries)) if query is None else attribution._positions([query])
    selected = attribution._selected(runs)
    chosen = selected._difference(difference, infers=True)
    # of runs that share seeds, the spread would be too small
    has_spread = len(selected.runs) > 1 and not sharing_a_seed(selected)
    rows: list[dict[str, Any]] = []
    for q in positions:
        candidates, influence = top_candidates(selected.select([q]), chosen)
        first = influence.abs().argsort(descending=True)[:k]
        order, influence = candidates[first], influence[first]
        of_query = selected.baseline[:, q, None].double()
        samples = of_query, selected._predicted(of_query, selected.responses[:, q, order].double())
        spread = DIFFERENCES["spread"](*samples) if has_spread else influence * torch.nan
        columns = {
            "influence": influence,
            "standard_error": chosen.standard_error(*samples),
            "mean_influence": DIFFERENCES["mean"](*samples),
            "spread_influence": spread,
            "out_of_range": share_outside(attribution, samples[1]),
        }
        values = zip(*(column.tolist() for column in columns.values()), strict=True)
        for rank, (n, figures) in enumerate(zip(order.tolist(), values, strict=True), start=1):
            named = {"query": attribution.queries[q], "rank": rank, **_named(attribution, n)}
            rows.append(named | dict(zip(columns, figures, strict=True)))
    return pd.DataFrame(rows)


def most_listed(attribution: Attribution) -> int:
    """Return :attr:`Attribution.most_listed`."""
    responses = attribution.responses
    if isinstance(responses, KeptResponses) and responses.kept.shape[1] < responses.shape[2]:
        return responses.k
    return responses.shape[2]


def to_xarray(attribution: Attribution) -> xr.Dataset:
    """Return baseline, responses, influences and standard errors as a data set with named dimensions, in memory.

    If the measurement's range is known, ``out_of_range`` is the share of runs that are predicted outside of it.
    The dimensions are ``run``, ``query`` and ``example``. With groups, ``removal`` replaces ``example``, and the
    coordinate ``size`` is the number of examples. With :meth:`Attribution.keep_top`, ``responses`` has the dimension
    ``place`` instead, and ``kept`` the positions of its removals.
    """
    import xarray as xr

    removal = "example" if attribution.removals is None else "removal"
    data: dict[str, Any] = {"baseline": (("run", "query"), as_array(attribution.baseline))}
    if isinstance(attribution.responses, KeptResponses):
        data["kept"] = ("query", "place"), attribution.responses.kept.cpu().numpy()
        data["responses"] = ("run", "query", "place"), as_array(attribution.responses.table)
    else:
        data["responses"] = ("run", "query", removal), as_array(attribution.responses)
    if any(map(math.isfinite, attribution.known_range)):
        data["out_of_range"] = ("query", removal), attribution.out_of_range().cpu().numpy()
    names = attribution.available_differences
    for name in names + ["variance"] * ("spread" in names):  # the paper's, in the measurement's unit
        data[f"{name}_influence"] = (("query", removal), attribution.influence(name).cpu().numpy())
        data[f"{name}_standard_error"] = (("query", removal), attribution.standard_error(name).cpu().numpy())
    coordinates: dict[str, Any] = {
        "run": list(attribution.runs),
        "query": list(attribution.queries),
        removal: range(attribution.responses.shape[2]) if attribution.removals is None else list(attribution.removals),
    }
    if attribution.members is not None:
        coordinates["size"] = removal, [len(group) for group in attribution.members]
    attributes = {key: str(value) for key, value in attribution.about.items()}
    return xr.Dataset(data, coordinates, attributes)


def to_dataframe(attribution: Attribution) -> pd.DataFrame:
    """Return influences and standard errors, with one row for each query and removal."""
    dataset = attribution.to_xarray().drop_vars(["baseline", "responses", "kept", "run"], errors="ignore")
    return dataset.to_dataframe().reset_index()


def top_candidates(attribution: Attribution, difference: Difference) -> tuple[Tensor, Tensor]:
    """Return positions and influences of removals on a single query, including those at the top."""
    if attribution._figures is not None and known_as(difference) and isinstance(attribution.responses, KeptResponses):
        # from responses: the figures are rounded, which could change the order
        samples = attribution.baseline.double()
        without = attribution._predicted(samples, attribution.responses.table[:, 0].double())
        return attribution.responses.kept[0], difference(samples, without)
    influence = attribution._influence(difference)[0]
    return torch.arange(len(influence), device=influence.device), influence


def _named(attribution: Attribution, position: int) -> dict[str, Any]:
    """Return the columns that identify the removal at a position."""
    if attribution.removals is None:
        return {"example": position}
    group = attribution.about["removals"][position]
    return {"removal": group["name"], "size": len(group["examples"])}
