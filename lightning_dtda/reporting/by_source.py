"""Where the variance of a crossed ensemble comes from, and which removals change it, in words."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from lightning_dtda.attribution.attribution import Attribution
from lightning_dtda.attribution.sources import VarianceBySource, seeds_of
from lightning_dtda.errors import AttributionError
from lightning_dtda.reporting.certainty import FDR, LEVEL
from lightning_dtda.reporting.facts import without_repeated_warnings
from lightning_dtda.reporting.formatting import p_value
from lightning_dtda.reporting.wording import noun
from lightning_dtda.statistics.differences import Difference, SourceVariance
from lightning_dtda.statistics.variance_components import REST

_MOST_EFFECTS = 10
"""Number of removals that are named for each part."""


@dataclass(frozen=True)
class Part:
    """One source's part of the variance on one query.

    Args:
        source: The source, as :attr:`VarianceBySource.parts <lightning_dtda.attribution.sources.VarianceBySource>`.
        share: Its share in the total variance, between 0 and 1.
        variance: The estimate, in the square of the measurement's unit.
        low: Lower end of its interval.
        high: Upper end.
    """

    source: str
    share: float
    variance: float
    low: float
    high: float


@dataclass(frozen=True)
class Effect:
    """A removal that changes a part of the variance significantly.

    Args:
        query: Position of the query.
        source: The part.
        name: The example, or group.
        change: Change of the part, in the square of the measurement's unit.
        before: The part as trained.
        p_value: Its p-value.
        sentence: All this in words.
    """

    query: int
    source: str
    name: str
    change: float
    before: float
    p_value: float
    sentence: str


@dataclass(frozen=True)
class BySource:
    """Where the variance comes from.

    Args:
        said: The answer in a few sentences.
        parts: Parts of each query.
        effects: Removals that change a part, the clearest first; those that change the rest last.
    """

    said: tuple[str, ...]
    parts: tuple[tuple[Part, ...], ...]
    effects: tuple[Effect, ...]


def refuse_parts(differences: Iterable[Difference]) -> None:
    """Refuse parts of the variance among the differences of a report.

    Raises:
        AttributionError: If there is one.
    """
    for each in differences:
        if each.crossed:
            raise AttributionError(
                f"The {each.title} is always shown for a crossed ensemble, under 'Where the variance comes from'. "
                f"Leave {each.name} out of the differences."
            )


def by_source(attribution: Attribution) -> BySource | None:
    """Return where the variance comes from; ``None`` if the trusted runs are not crossed."""
    trusted = attribution.trusted()
    seeds = seeds_of(trusted)
    if not SourceVariance.names(seeds):
        return None
    found = trusted.variance_by_source(level=LEVEL)
    share = found.share
    parts = tuple(
        tuple(
            Part(source, *(float(each[n, q]) for each in (share, found.variance, *found.interval)))
            for n, source in enumerate(found.parts)
        )
        for q in range(len(trusted.queries))
    )
    with without_repeated_warnings():
        effects = [each for source in found.parts for each in _effects(trusted, source, found)]
    effects.sort(key=lambda each: (each.source == REST, each.p_value))  # the rest is harder to act on
    grid = " \N{MULTIPLICATION SIGN} ".join(f"{number} of the {source}" for source, number in found.seeds.items())
    middle = share.nanmedian(1).values
    said = [
        f"{found.runs} runs combine seeds ({grid}). Median over queries: "
        + ", ".join(f"{_named(s)} {100 * v:.0f} %" for s, v in zip(found.parts, middle.tolist(), strict=True))
        + " of the variance."
    ]
    what = noun(trusted)
    if effects:
        said += [each.sentence for each in effects[:3]]
    elif few := [source for source, number in found.seeds.items() if number < 3]:
        said.append(
            f"No {what} changes a part significantly; with two seeds of {' and '.join(map(_named, few))}, changes of "
            "its part cannot be tested. Record more seeds."
        )
    else:
        said.append(
            f"No single {what} changes a part significantly (false discovery rate {100 * FDR:g} %). Eight or more "
            "seeds of each source show more than these."
        )
    return BySource(tuple(said), parts, tuple(effects))


def _effects(trusted: Attribution, source: str, split: VarianceBySource) -> list[Effect]:
    """Return the removals that change a part significantly, the clearest first."""
    difference = SourceVariance(source)
    change, p = trusted.influence(difference), trusted.p_values(difference)
    queries, removals = trusted.significant(difference, FDR).nonzero().unbind(1)
    order = p[queries, removals].argsort()[:_MOST_EFFECTS]
    of_source = split.variance[split.parts.index(source)]
    names, what = trusted.removals, noun(trusted)
    found = []
    for query, removal in torch.stack([queries, removals], 1)[order].tolist():
        name = f"{what} {removal if names is None else names[removal]}"
        amount, whole = float(change[query, removal]), float(of_source[query])
        # the estimate of a small part may fall below zero; more than all of it cannot go
        least = min(abs(amount) / whole, 1.0 if amount < 0 else math.inf) if whole > 0 else 0.0
        share = f" by {100 * least:.0f} %" if whole > 0 else ""
        sentence = (
            f"Without {name}, the part of query {trusted.queries[query]}'s variance that comes from {_named(source)} "
            f"{'falls' if amount < 0 else 'rises'}{share} (p {_p(float(p[query, removal]))})."
        )
        found.append(Effect(query, source, name, amount, whole, float(p[query, removal]), sentence))
    return found


def _p(value: float) -> str:
    shown = p_value(value)
    return shown if shown.startswith("<") else f"= {shown}"


def _named(source: str) -> str:
    return "the rest" if source == REST else f"the {source}"
