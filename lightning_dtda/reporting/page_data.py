"""What the page shows of all queries and examples: compact columns for the tables and figures of the browser."""

from __future__ import annotations

import base64
import gzip
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from lightning_dtda.attribution.attribution import Attribution
from lightning_dtda.attribution.gallery import Shown
from lightning_dtda.reporting.certainty import FDR, LEVEL, Tested, samples
from lightning_dtda.reporting.figures import points_to_draw
from lightning_dtda.reporting.findings import MOST_MEMBERS, Findings, QueryFindings, Ranked
from lightning_dtda.reporting.rows import TopExample
from lightning_dtda.reporting.wording import noun

MOST_QUERIES = 1000
"""Maximum number of queries on a page."""

MOST_NUMBERS = 1_500_000
"""Number of figures in all tables together: about 5 MB in the file."""

MOST_POINTS = 100_000
"""Number of points in all figures of mean against spread influence together, about 15 bytes each."""

MOST_POINTS_DRAWN = 2_000
"""Number of points that a browser draws at once without delay."""

MOST_IMAGES = 1_000_000
"""Bytes of all pictures together."""

_COLUMNS = 13  # numbers in a row of a table, beside the changes in each run
_DIGITS, _FEW_DIGITS = 6, 4  # of numbers in tables; of points in figures, where a pixel has fewer
_ROUNDED_AGAIN = 8  # of numbers that the page rounds to the digits that their intervals support, as Python would


def rows_listed(attribution: Attribution, differences: int, k: int) -> int:
    """Return how many rows a query's table can have for each difference, at least k.

    Args:
        attribution: The attribution.
        differences: Number of differences.
        k: Number of rows that are asked for.
    """
    runs, queries, removals = attribution.responses.shape
    room = MOST_NUMBERS // (min(queries, MOST_QUERIES) * differences * (runs + _COLUMNS))
    return min(max(room, k), removals)


@dataclass(eq=False)
class Overview:
    """What is collected of all removals while the queries are tested.

    Args:
        differences: Number of differences that are shown.
        queries: Number of queries.
        points: For each query, position, mean and spread influence, and significance of removals to draw.
        significant: For each difference, the number of queries on which each removal is significant ``(removals,)``.
        largest: For each difference, the influence of each removal on the query where it is largest ``(removals,)``.
        where: Position of that query ``(removals,)``.
    """

    differences: int
    queries: int
    points: dict[int, dict[str, list[Any]]] = field(default_factory=dict)
    significant: list[Tensor] = field(default_factory=list)
    largest: list[Tensor] = field(default_factory=list)
    where: list[Tensor] = field(default_factory=list)

    def __call__(self, query: int, tests: Sequence[Tested]) -> None:
        """Take in the tests of a query."""
        for number, of_query in enumerate(tests[: self.differences]):
            influence = of_query.influence.nan_to_num(0.0)
            if query == 0:
                self.significant.append(torch.zeros(len(influence), dtype=torch.int64))
                self.largest.append(torch.zeros_like(influence))
                self.where.append(torch.zeros(len(influence), dtype=torch.int64))
            self.significant[number] += of_query.significant
            larger = influence.abs() > self.largest[number].abs()
            self.largest[number][larger] = influence[larger]
            self.where[number][larger] = query
        by_name = {each.difference.name: each for each in tests}
        if query < MOST_QUERIES and "spread" in by_name:
            self.points[query] = _points(
                by_name["mean"], by_name["spread"], MOST_POINTS // min(self.queries, MOST_QUERIES)
            )

    def content(self, findings: Findings) -> list[dict[str, Any]]:
        """Return the columns of the table of all removals, for each difference."""
        shown = [ranked.difference.shown for ranked in findings.queries[0].ranked]
        return [
            {
                "count": count.tolist(),
                "largest": _rounded([as_shown(value) for value in largest.tolist()], _FEW_DIGITS),
                "where": where.tolist(),
            }
            for as_shown, count, largest, where in zip(shown, self.significant, self.largest, self.where, strict=True)
        ]


def content(findings: Findings, overview: Overview) -> dict[str, Any]:
    """Return everything that the page draws from, as plain data.

    Args:
        findings: The findings; each query's rows are all that the page lists.
        overview: What was collected meanwhile.
    """
    attribution = findings.attribution.trusted()
    chosen = sorted(findings.most_interesting[:MOST_QUERIES])
    ranked = findings.queries[0].ranked
    curves = findings.attribution.about.get("adjoint_norms", {})
    return {
        "noun": noun(attribution),
        "measurement": attribution.measurement,
        "level": LEVEL,
        "fdr": FDR,
        "range": _rounded(attribution.known_range, _DIGITS),
        "runs": attribution.runs,
        "first": chosen.index(findings.most_interesting[0]),
        "removals": attribution.responses.shape[2],
        "names": attribution.removals,
        "sizes": None if attribution.members is None else [len(group) for group in attribution.members],
        "members": None if attribution.members is None else [group[:MOST_MEMBERS] for group in attribution.members],
        "differences": [_difference(each, number, ranked) for number, each in enumerate(ranked)],
        "queries": [_query(attribution, findings.queries[position], overview) for position in chosen],
        "examples": _gallery(attribution.gallery.examples, _first_images(findings, chosen)),
        "across": overview.content(findings),
        "adjoints": [
            {"run": run, "chaotic": run in findings.attribution.chaotic, **_curve(curves[run])}
            for run in findings.attribution.runs
            if curves.get(run)
        ],
    }


def packed(data: Any) -> str:
    """Return plain data as text for the page: JSON, gzip, base64. Numbers that are not finite become null."""
    return base64.b64encode(gzip.compress(msgspec.json.encode(data), 6, mtime=0)).decode()


def shown_content(shown: Shown, with_image: bool = True) -> dict[str, Any]:
    """Return the parts that an example or a query has, its picture as a ``data:`` address."""
    image = shown.image if with_image else None
    parts = {
        "name": shown.name,
        "label": shown.label,
        "text": shown.text,
        "fields": shown.fields,
        "prediction": shown.prediction,
        "image": None if image is None else f"data:image/png;base64,{base64.b64encode(image).decode()}",
    }
    return {name: value for name, value in parts.items() if value}


def _difference(ranked: Ranked, number: int, every: Sequence[Ranked]) -> dict[str, Any]:
    name, words = ranked.difference.name, ranked.words
    # two settings of a class share its name
    before = sum(each.difference.name == name for each in every[:number])
    return {
        "key": f"{name}-{before + 1}" if before else name,
        "name": name,
        "title": words.title,
        "question": words.question,
        "formula": words.formula,
        "meaning": words.meaning,
        "short": words.short,
        "unit": words.unit,
        "reading": words.reading,
        "relative": ranked.difference.relative,
        "signed": ranked.difference.signed,
        "noInterval": ranked.no_interval,
        "planned": ranked.planned,
    }


def _query(attribution: Attribution, query: QueryFindings, overview: Overview) -> dict[str, Any]:
    one = attribution.select([query.position])
    listed = sorted({row.position for ranked in query.ranked for row in ranked.rows})
    baseline, predicted = samples(one, listed)
    changes = _significant_digits((predicted - baseline).cpu().numpy().T, _FEW_DIGITS)
    return {
        "position": query.position,
        "id": attribution.queries[query.position],
        "name": query.name,
        "shown": shown_content(query.shown),
        "trained": query.as_trained.sentence,
        "value": query.as_trained.value,
        "baseline": _rounded(baseline[:, 0].tolist(), _DIGITS),
        "ranked": [
            {
                "verdict": ranked.verdict,
                "found": ranked.outcome.discoveries,
                "effects": [card.effect for card in ranked.cards],
                "rows": _columns(ranked.rows),
            }
            for ranked in query.ranked
        ],
        "listed": listed,
        "changes": changes.tolist(),
        "points": overview.points.get(query.position),
    }


def _columns(rows: Sequence[TopExample]) -> dict[str, list[Any]]:
    """Return the rows of a table, column by column."""
    numbers = {
        "influence": ("influence", _ROUNDED_AGAIN),
        "low": ("interval_low", _ROUNDED_AGAIN),
        "high": ("interval_high", _ROUNDED_AGAIN),
        "p": ("p_value", _DIGITS),
        "q": ("q_value", _FEW_DIGITS),
        "fewest": ("retrainings_low", _DIGITS),
        "most": ("retrainings_high", _DIGITS),
        "mean": ("mean_influence", _FEW_DIGITS),
        "spread": ("spread_influence", _FEW_DIGITS),
        "outside": ("out_of_range", _FEW_DIGITS),
    }
    return {
        "rank": [row.rank for row in rows],
        "position": [row.position for row in rows],
        "significant": [int(row.significant) for row in rows],
        **{key: _rounded([getattr(row, name) for row in rows], digits) for key, (name, digits) in numbers.items()},
    }


def _points(mean: Tested, spread: Tested, most: int) -> dict[str, list[Any]]:
    """Return mean and spread influence of a query's removals to draw; the spread in percent."""
    shift, change = mean.influence.numpy(), 100 * np.expm1(spread.influence.numpy())
    drawn = points_to_draw(shift, change, min(most, MOST_POINTS_DRAWN))
    return {
        "position": drawn.tolist(),
        "mean": _rounded(shift[drawn], _FEW_DIGITS),
        "spread": _rounded(change[drawn], _FEW_DIGITS),
        "significant": (mean.significant[drawn] + 2 * spread.significant[drawn]).tolist(),
    }


def _first_images(findings: Findings, chosen: Iterable[int]) -> set[int]:
    """Return the examples whose pictures are in the file: those on cards, the first ranks first, up to a limit."""
    gallery, size = findings.attribution.gallery, 0
    images: set[int] = set()
    members = findings.attribution.members
    rows = [ranked.rows for position in chosen for ranked in findings.queries[position].ranked]
    for rank in range(max(map(len, rows), default=0)):
        for of_query in rows:
            if rank >= len(of_query):
                continue
            position = of_query[rank].position
            for example in (position,) if members is None else members[position][:MOST_MEMBERS]:
                image = gallery.example(example).image
                if image is None or example in images:
                    continue
                size += len(image)
                if size > MOST_IMAGES:
                    return images
                images.add(example)
    return images


def _gallery(examples: Any, with_image: set[int]) -> dict[int, Any]:
    return {index: shown_content(shown, index in with_image) for index, shown in examples.items()}


def _curve(norms: dict[str, float]) -> dict[str, list[Any]]:
    points = sorted((int(step), length) for step, length in norms.items())
    return {"steps": [step for step, _ in points], "norms": _rounded([length for _, length in points], _FEW_DIGITS)}


def _rounded(values: Any, digits: int) -> list[float]:
    rounded: list[float] = _significant_digits(np.asarray(values, dtype=np.float64), digits).tolist()
    return rounded


def _significant_digits(values: np.ndarray, digits: int) -> np.ndarray:
    """Return values rounded to a number of significant digits, which JSON then writes with these digits alone."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        power = digits - 1 - np.floor(np.log10(np.abs(values)))
        up, down = 10.0 ** np.clip(power, 0, 300), 10.0 ** np.clip(-power, 0, 300)
        rounded = np.round(values * up / down) / up * down
    return np.where(np.isfinite(rounded), rounded, values)
