"""Plotly figures of an attribution. Each function is pure: it takes an attribution and returns a figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go
import torch
from torch import Tensor

from lightning_dtda.attribution.attribution import Attribution
from lightning_dtda.reporting.certainty import FDR, LEVEL, all_intervals, tested
from lightning_dtda.reporting.figure_style import BLUE, GREEN, INK, MUTED, VERMILLION, figure
from lightning_dtda.reporting.formatting import MINUS, capital
from lightning_dtda.reporting.rows import TopExample, top_examples
from lightning_dtda.reporting.wording import counted, describe, noun
from lightning_dtda.statistics.differences import Difference, resolve_difference

MOST_POINTS = 20_000
"""Maximum number of points in one query's figure: about one megabyte, and what a browser still moves smoothly."""

MOST_QUERIES = 60
"""Maximum number of boxes side by side: more cannot be distinguished on a screen."""

_SVG_POINTS = 5_000  # above this a browser draws SVG markers too slowly; WebGL takes over
_POINT_DIGITS, _ERROR_DIGITS = 6, 3  # of the many points: enough for any screen
_FEW_DECADES = 1e3  # up to here a logarithmic axis has room for ticks at 1, 2 and 5 in each decade
_LABELLED = 3  # removals labelled for each of the two axes: more would overlap


def influence_figure(attribution: Attribution, query: int, most_points: int = MOST_POINTS) -> go.Figure:
    """Draw the mean influence of every example, or group, against its spread influence, for one query.

    Colours show which of the two are significant, at a false discovery rate of
    :data:`~lightning_dtda.reporting.certainty.FDR` among all removals. With a single run there is no spread; the
    mean influence is then drawn against the example's index or the group's position.

    Args:
        attribution: The attribution.
        query: Position of the query.
        most_points: Maximum number of examples, or groups, to draw. If there are more, half of the points are those
            with the largest mean and spread influence, the other half every n-th of the rest; the title says so.
    """
    selected, measurement = attribution.select([query]), escape(attribution.measurement)
    what = noun(attribution)
    several = len(selected.runs) > 1
    points = _points(selected)
    drawn, removals = points_to_draw(points.shift, points.change, most_points), len(points.shift)
    thinned = f" ({len(drawn)} of {removals} {what}s)" if len(drawn) < removals else ""
    change = f"change of the {measurement}'s standard deviation<br>if removed (SD Y / SD X {MINUS} 1, in %)"
    lines = f"; lines: {100 * LEVEL:g} % intervals" if several else ""
    every, place = "training example", "training example (index)"
    if what == "group":
        every, place = "group of training examples", "group (position)"
    one_run = f"{place};<br>a single run has no spread"
    plot = figure(
        f"Every {every}, query {selected.queries[0]}{thinned}",
        xaxis={"title": {"text": f"change of the mean {measurement}<br>if removed (E Y {MINUS} E X){lines}"}},
        yaxis={"title": {"text": change if several else one_run}},
        legend={"title": {"text": f"significant (FDR {100 * FDR:g} %):"}},
        showlegend=several,
    )
    clear_shift, clear_change = (tested(selected, name).significant.numpy() for name in ("mean", "spread"))
    for name, color, members in (
        ("neither", MUTED, ~clear_shift & ~clear_change),
        ("mean", BLUE, clear_shift & ~clear_change),
        ("spread", VERMILLION, ~clear_shift & clear_change),
        ("both", GREEN, clear_shift & clear_change),
    ):
        add = plot.add_scattergl if len(drawn) > _SVG_POINTS else plot.add_scatter
        add(name=name, **_markers(points, drawn[members[drawn]], color, several, attribution))
    named = _largest(points.shift, _LABELLED)
    if several:
        named = np.union1d(named, _largest(points.change, _LABELLED))
    plot.add_scatter(**_labels(points, named, attribution))
    return plot


def removal_figure(attribution: Attribution, query: int, removed: Sequence[int]) -> go.Figure:
    """Draw one query's measurement in every run, as trained and predicted without some examples.

    A line joins the two values of a run: lines that diverge show that removal adds variance, lines that converge that
    it takes variance away. Mean and standard deviation are drawn beside the runs.

    Args:
        attribution: The attribution.
        query: Position of the query.
        removed: Indices of the training examples, or positions of the groups, that are removed together.
    """
    selected = attribution.select([query])
    trained, predicted = _numpy(selected.baseline[:, 0]), _numpy(selected.predict(removed)[:, 0])
    without = _without(attribution, removed)
    plot = figure(
        f"Query {selected.queries[0]}, {without}",
        xaxis={
            "tickvals": [0, 1],
            "ticktext": ["as trained<br>(X)", f"{without}<br>(Y), predicted"],
            "range": [-0.35, 1.35],
            "zeroline": False,
            "showgrid": False,
        },
        yaxis={"title": {"text": f"{escape(attribution.measurement)} on the query"}, "zeroline": False},
    )
    if float(selected.out_of_range(removed)[0]):
        sides = ("below", "bottom right"), ("above", "top right")
        for end, (side, place) in zip(selected.known_range, sides, strict=True):
            if math.isfinite(end):
                words = f"the {escape(attribution.measurement)} is never {side} {end:g}"
                plot.add_hline(end, line_dash="dot", annotation_text=words, annotation_position=place)
    for name, color, members in (("falls", BLUE, predicted <= trained), ("rises", VERMILLION, predicted > trained)):
        runs = [escape(run) for run, member in zip(selected.runs, members, strict=True) if member]
        pairs = np.stack([trained[members], predicted[members], np.full(len(runs), np.nan)], 1)
        plot.add_scatter(
            x=[0, 1, None] * len(runs),
            y=_numbers(pairs.ravel()),
            text=[run for run in runs for _ in range(3)],
            mode="lines+markers",
            line={"color": color, "width": 1.2},
            marker={"size": 6, "opacity": 0.8},
            opacity=0.75,
            name=f"{counted(len(runs), 'run')}: {name}",
            hovertemplate="%{text}: %{y:.4g}<extra></extra>",
        )
    if len(selected.runs) > 1:
        means, spreads = [trained.mean(), predicted.mean()], [trained.std(ddof=1), predicted.std(ddof=1)]
        plot.add_scatter(
            x=[-0.18, 1.18],
            y=_numbers(np.array(means)),
            error_y=_error_bars(np.array(spreads), thickness=2, width=8),
            mode="markers",
            marker={"color": INK, "size": 10, "symbol": "diamond"},
            customdata=_numbers(np.array(spreads)),
            name="mean ± standard deviation",
            hovertemplate="mean %{y:.4g}, standard deviation %{customdata:.3g}<extra></extra>",
        )
    return plot


def top_figure(
    attribution: Attribution,
    query: int,
    difference: str | Difference,
    k: int = 10,
    rows: Sequence[TopExample] | None = None,
) -> go.Figure:
    """Draw the examples, or groups, of the largest influence on one query, with their intervals over seeds.

    Blue bars are significant, at a false discovery rate of :data:`~lightning_dtda.reporting.certainty.FDR` among all
    removals; the others are grey.

    Args:
        attribution: The attribution.
        query: Position of the query.
        difference: As for :meth:`Attribution.influence`.
        k: Number of examples or groups.
        rows: The examples, or groups, as :func:`~lightning_dtda.reporting.findings.top_examples` returns them;
            ``None`` computes them.
    """
    what = noun(attribution)
    difference = resolve_difference(difference)
    words = describe(difference, escape(attribution.measurement), what)
    bars = "" if difference.no_interval(len(attribution.runs)) else f" (lines: {100 * LEVEL:g} % intervals)"
    title = "training example" if what == "example" else "group of training examples"
    top = top_examples(attribution, query, difference, k) if rows is None else rows
    names = [escape(row.name) for row in top]
    plot = figure(
        f"{capital(words.title)}, query {attribution.queries[query]}",
        xaxis={"title": {"text": f"{words.formula}{' (%)' * difference.relative}:<br>{words.short}{bars}"}},
        yaxis={"title": {"text": title}, "type": "category", "autorange": "reversed", "showgrid": False},
        showlegend=False,
    )
    plot.add_bar(
        x=[row.influence for row in top],
        y=names,
        customdata=[
            [_interval(row.interval_low, row.interval_high), row.p_value, row.mean_influence, row.spread_influence]
            for row in top
        ],
        orientation="h",
        marker={"color": [BLUE if row.significant else MUTED for row in top]},
        hovertemplate=f"<b>{what} %{{y}}</b><br>influence %{{x:.3g}}%{{customdata[0]}}<br>"
        "p = %{customdata[1]:.2g}<br>mean influence %{customdata[2]:.3g}<br>"
        "spread influence %{customdata[3]:.3g} %<extra></extra>",
    )
    # separate lines: error bars have to contain the estimate, and an interval need not
    plot.add_scatter(
        x=[end for row in top for end in (row.interval_low, row.interval_high, None)],
        y=[name for name in names for _ in range(3)],
        mode="lines+markers",
        line={"color": INK, "width": 1},
        marker={"color": INK, "size": 9, "symbol": "line-ns", "line": {"color": INK, "width": 1}},
        hoverinfo="skip",
    )
    return plot


def baseline_figure(attribution: Attribution, queries: Sequence[int] | None = None) -> go.Figure:
    """Draw the distribution of each query's measurement over runs, the queries that depend most on the seed first.

    Args:
        attribution: The attribution.
        queries: Positions of the queries; ``None`` means all. If there are more than :data:`MOST_QUERIES`, those with
            the largest standard deviation are drawn, and the title says so.
    """
    positions = list(range(len(attribution.queries))) if queries is None else list(queries)
    baseline = _numpy(attribution.baseline)
    spread = baseline.std(0)
    ordered = sorted(positions, key=lambda query: -spread[query])[:MOST_QUERIES]
    kept = f"the {len(ordered)} least stable of {len(positions)} queries" if len(ordered) < len(positions) else ""
    measurement = escape(attribution.measurement)
    plot = figure(
        f"The {measurement} as trained, over {counted(len(attribution.runs), 'run')}" + (f": {kept}" if kept else ""),
        xaxis={"title": {"text": "query (those that depend most on the seed first)"}, "type": "category"},
        yaxis={"title": {"text": f"{measurement} on the query"}, "zeroline": False},
        showlegend=False,
    )
    runs = [escape(run) for run in attribution.runs]
    for query in ordered:
        plot.add_box(
            y=_numbers(baseline[:, query]),
            name=str(attribution.queries[query]),
            text=runs,
            meta=query,
            boxpoints="all",
            jitter=0.5,
            pointpos=0,
            marker={"color": BLUE, "size": 4, "opacity": 0.6},
            line={"color": INK, "width": 1},
            fillcolor="rgba(0,114,178,0.12)",
            hoveron="points",
            hovertemplate="query %{x}<br>%{text}: %{y:.4g}<extra></extra>",
        )
    return plot


def adjoint_figure(attribution: Attribution) -> go.Figure:
    """Draw the norm of each run's adjoint over the training steps, relative to its norm at the end of training.

    It shows how strongly a small change of the parameters at a step affects the measurement at the end (median over
    queries). Chaotic runs, which are left out, have a colour of their own.

    Args:
        attribution: The attribution; runs without a stored adjoint are not drawn.
    """
    plot = figure(
        "Effect of a small change at step t",
        xaxis={"title": {"text": "step t"}, "zeroline": False},
        yaxis={"title": {"text": "norm of the adjoint,<br>relative to the end"}, "type": "log"},
        showlegend=bool(attribution.chaotic),
    )
    curves = attribution.about.get("adjoint_norms", {})
    lengths = [length for curve in curves.values() for length in (curve or {}).values() if length > 0]
    if lengths and max(lengths) < _FEW_DECADES * min(lengths):  # plotly would label a single tick
        ticks = [digit * 10.0**power for power in range(-9, 10) for digit in (1, 2, 5)]
        plot.update_yaxes(tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks])
    for number, run in enumerate(sorted(attribution.runs, key=lambda run: run in attribution.chaotic)):
        is_chaotic = run in attribution.chaotic
        points = sorted((int(step), length) for step, length in (curves.get(run) or {}).items())
        plot.add_scatter(
            x=[step for step, _ in points],
            y=_numbers(np.array([length for _, length in points])),
            mode="lines",
            line={"color": VERMILLION if is_chaotic else BLUE, "width": 1.5 if is_chaotic else 1},
            opacity=0.8,
            name="chaotic, left out" if is_chaotic else "trusted",
            legendgroup=str(is_chaotic),
            showlegend=number in (0, len(attribution.runs) - len(attribution.chaotic)),
            hovertemplate=f"{escape(run)}, step %{{x}}: %{{y:.3g}}<extra></extra>",
        )
    return plot


@dataclass(frozen=True)
class _Points:
    """Mean and spread influence of every removal ``(removals,)``, with intervals ``(2, removals)``; spread in percent.

    With a single run, the removal's position replaces the spread influence.
    """

    shift: np.ndarray
    shift_ends: np.ndarray
    change: np.ndarray
    change_ends: np.ndarray


def _points(selected: Attribution) -> _Points:
    shift, shift_ends = _numpy(selected.influence("mean")[0]), _numpy(all_intervals(selected, "mean"))
    if len(selected.runs) == 1:
        return _Points(shift, shift_ends, np.arange(len(shift), dtype=np.float64), shift_ends)
    change, change_ends = selected.influence("spread")[0], all_intervals(selected, "spread")
    in_percent = 100 * np.expm1(_numpy(torch.cat([change[None], change_ends])))
    in_percent[:, ~np.isfinite(in_percent[0])] = np.nan  # from no spread at all: not on this scale
    return _Points(shift, shift_ends, in_percent[0], in_percent[1:])


def points_to_draw(shift: np.ndarray, change: np.ndarray, most_points: int) -> np.ndarray:
    """Return the removals to draw: those with the largest influences, and an evenly spaced choice of the rest.

    Args:
        shift: Mean influences ``(removals,)``.
        change: Spread influences ``(removals,)``.
        most_points: Maximum number of removals.
    """
    removals = np.arange(len(shift))
    if len(removals) <= most_points:
        return removals
    notable = np.union1d(_largest(shift, most_points // 4), _largest(change, most_points // 4))
    rest = np.setdiff1d(removals, notable)
    even = np.linspace(0, len(rest) - 1, most_points - len(notable)).astype(int)
    return np.union1d(notable, rest[even])


def _markers(
    points: _Points, chosen: np.ndarray, color: str, several: bool, attribution: Attribution
) -> dict[str, Any]:
    """Return the arguments of a scatter trace of some removals."""
    change = "<br>spread influence %{y:.3g} %%{customdata[2]}" if several else ""
    ends = (
        [_interval(*pair) for pair in each[:, chosen].T.tolist()] for each in (points.shift_ends, points.change_ends)
    )
    return {
        "x": _numbers(points.shift[chosen], _POINT_DIGITS),
        "y": _numbers(points.change[chosen], _POINT_DIGITS),
        "customdata": list(zip(_names(attribution, chosen), *ends, strict=True)),
        "mode": "markers",
        "marker": {"color": color, "size": 7, "opacity": 0.75, "line": {"width": 0.5, "color": "white"}},
        "hovertemplate": f"<b>{noun(attribution)} %{{customdata[0]}}</b><br>"
        f"mean influence %{{x:.3g}}%{{customdata[1]}}{change}<extra></extra>",
    }


def _labels(points: _Points, named: np.ndarray, attribution: Attribution) -> dict[str, Any]:
    """Return the arguments of a scatter trace that labels some removals and shows their intervals."""
    return {
        "x": _numbers(points.shift[named]),
        "y": _numbers(points.change[named]),
        "error_x": _interval_bars(points.shift[named], points.shift_ends[:, named]),
        "error_y": _interval_bars(points.change[named], points.change_ends[:, named]),
        "text": [str(name) for name in _names(attribution, named)],
        "textposition": "top right",
        "cliponaxis": False,
        "mode": "markers+text",
        "marker": {"color": "rgba(0,0,0,0)", "size": 11, "line": {"color": INK, "width": 1}},
        "hoverinfo": "skip",
        "showlegend": False,
    }


def _largest(values: np.ndarray, number: int) -> np.ndarray:
    return np.argsort(-np.abs(values), kind="stable")[:number]


def _interval(low: float, high: float) -> str:
    """Return what a hover text says of an interval; nothing if there is none."""
    return "" if math.isnan(low) else f" [{low:.{_ERROR_DIGITS}g}, {high:.{_ERROR_DIGITS}g}]"


def _interval_bars(values: np.ndarray, ends: np.ndarray) -> dict[str, Any]:
    bars = _error_bars(ends[1] - values, thickness=0.8, width=0)
    return bars | {"symmetric": False, "arrayminus": _numbers(values - ends[0])}


def _error_bars(errors: np.ndarray, thickness: float, width: float) -> dict[str, Any]:
    # plotly would draw unknown errors as zero
    known = bool(np.isfinite(errors).all())
    return {"array": _numbers(errors), "visible": known, "color": INK, "thickness": thickness, "width": width}


def _without(attribution: Attribution, removed: Sequence[int]) -> str:
    what = noun(attribution)
    if len(removed) > 3:  # a longer list would not fit under the axis
        return f"without {len(removed)} {what}s"
    names = ", ".join(str(name) for name in _names(attribution, np.array(removed, dtype=int)))
    return f"without {what}{'s' if len(removed) > 1 else ''} {names}"


def _names(attribution: Attribution, positions: np.ndarray) -> list[Any]:
    """Return the indices of examples, or the HTML-escaped names of groups."""
    names = attribution.removals
    return positions.tolist() if names is None else [escape(names[position]) for position in positions.tolist()]


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().cpu().numpy()


def _numbers(values: np.ndarray, digits: int = 8) -> list[float]:
    # lists: not every plotly.js reads plotly's binary arrays (W&B has its own version); few digits keep files small
    return [float(f"{value:.{digits}g}") for value in values.tolist()]
