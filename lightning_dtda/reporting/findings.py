"""What was found, in one object: page, terminal and W&B show the same findings, so they cannot disagree."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_dtda.attribution.attribution import Attribution
from lightning_dtda.attribution.gallery import Shown
from lightning_dtda.execution.progress import progress_bar
from lightning_dtda.reporting import wording
from lightning_dtda.reporting.by_source import BySource, by_source, refuse_parts
from lightning_dtda.reporting.certainty import Outcome, Tested, each_tested
from lightning_dtda.reporting.facts import agreement, without_repeated_warnings
from lightning_dtda.reporting.judging import Verdict, judge
from lightning_dtda.reporting.next_steps import NextStep, next_steps
from lightning_dtda.reporting.rows import TopExample, top_examples
from lightning_dtda.reporting.verdicts import retraining_verdict, verdict, verdict_on_all
from lightning_dtda.statistics.differences import Difference, resolve_difference
from lightning_dtda.statistics.power import can_be_planned

MOST_CARDS = 5
"""Number of examples, or groups, that are shown in full for each query."""

_QUICK = 2**22
"""Number of responses that are tested in a few seconds."""

MOST_MEMBERS = 4
"""Number of a group's examples that are shown."""


@dataclass(frozen=True)
class Card:
    """One of the examples, or groups, that matter most to a query, to be shown in full.

    Args:
        row: Its influence, interval and significance.
        title: What to call it: "example 155", or its name.
        shown: The example as people see it; for a group, some of its members.
        effect: What happens without it, in words.
    """

    row: TopExample
    title: str
    shown: tuple[Shown, ...]
    effect: str


@dataclass(frozen=True)
class Ranked:
    """The examples, or groups, with the largest influences on one query by one difference.

    Args:
        difference: The difference.
        words: What introduces it.
        outcome: What the tests say of all removals together.
        verdict: The same in sentences.
        rows: The top examples, or groups, and others that are listed.
        cards: The first of them, to be shown in full.
        no_interval: Why there are no intervals; empty if there are.
        planned: Whether numbers of retrainings are known.
    """

    difference: Difference
    words: wording.Wording
    outcome: Outcome
    verdict: str
    rows: tuple[TopExample, ...]
    cards: tuple[Card, ...]
    no_interval: str
    planned: bool


@dataclass(frozen=True)
class QueryFindings:
    """What was found on one query.

    Args:
        position: Its position in the attribution.
        name: What to call it: "query 4", or its own name.
        shown: The query as people see it.
        as_trained: The measurement as trained, over runs, in words.
        ranked: The top examples, or groups, by each difference.
    """

    position: int
    name: str
    shown: Shown
    as_trained: wording.AsTrained
    ranked: tuple[Ranked, ...]


@dataclass(frozen=True)
class Findings:
    """What an attribution shows, and how far it can be trusted.

    Args:
        attribution: The attribution, with all runs.
        question: What was asked.
        answer: How it was answered.
        verdict: Whether the attribution can be used.
        said: For each difference, what is significant on how many queries.
        cautions: What to know before trusting a number.
        queries: What was found on each query.
        next_steps: What to do now.
        agreement: Agreement of halves of the runs on the mean influence, median over queries; NaN if unknown.
        sources: Where the variance of a crossed ensemble comes from. All else is then of runs that share no seed.
    """

    attribution: Attribution
    question: str
    answer: str
    verdict: Verdict
    said: tuple[str, ...]
    cautions: tuple[str, ...]
    queries: tuple[QueryFindings, ...]
    next_steps: tuple[NextStep, ...]
    agreement: float
    sources: BySource | None = None

    @property
    def most_interesting(self) -> list[int]:
        """Positions of the queries, those with the most significant influences first."""

        def interest(query: QueryFindings) -> tuple[int, float]:
            outcomes = [ranked.outcome for ranked in query.ranked]
            return sum(each.discoveries for each in outcomes), -min(each.clearest_p for each in outcomes)

        return [query.position for query in sorted(self.queries, key=interest, reverse=True)]


def find(
    attribution: Attribution,
    k: int = 10,
    differences: Sequence[str | Difference] | None = None,
    progress: bool = False,
    listed: int | None = None,
    watch: Callable[[int, Sequence[Tested]], None] | None = None,
) -> Findings:
    """Test every removal on every query, and put together what people need to know.

    Args:
        attribution: The attribution; results are those of its trusted runs.
        k: Number of examples, or groups, to list for each query and difference.
        differences: As for :meth:`Attribution.influence <lightning_dtda.Attribution.influence>`. ``None`` means mean,
            spread and Wasserstein.
        progress: Whether to show a progress bar if it takes more than a few seconds.
        listed: As for :func:`~lightning_dtda.reporting.rows.top_examples`.
        watch: Function that is called with each query's position and its tests, before they are dropped: those of the
            differences, then those of mean and spread if they are not among them.

    Raises:
        AttributionError: If ``k`` is less than one, a difference is unknown, or it needs more runs.
    """
    sources = by_source(attribution)
    attribution = attribution.independent()
    trusted = attribution.trusted()
    chosen = [resolve_difference(each) for each in differences or trusted.available_differences]
    refuse_parts(chosen)
    judged = [resolve_difference(name) for name in ("mean", "spread") if name in trusted.available_differences]
    asked = chosen + [each for each in judged if each.name not in {other.name for other in chosen}]
    queries, outcomes, outside, size = [], [], 0, math.prod(trusted.responses.shape)
    with (
        without_repeated_warnings(),
        progress_bar("statistics", "queries", len(trusted.queries), progress and size > _QUICK) as advance,
    ):
        for position, tests in enumerate(each_tested(trusted, asked)):
            one = trusted.select([position])
            found = _on_query(one, position, tests[: len(chosen)], k, listed)
            if watch is not None:
                watch(position, tests)
            queries.append(found)
            outcomes.append({each.difference.name: each.outcome for each in tests})
            outside += _leaves_range(one)
            advance(1)
        agreed = agreement(trusted)
    of_judged = {each.name: [of_query[each.name] for of_query in outcomes] for each in judged}
    return Findings(
        attribution,
        wording.question(attribution),
        wording.answer(attribution),
        judge(attribution, of_judged, agreed, outside),
        tuple(verdict_on_all(trusted, [query.ranked[n].outcome for query in queries]) for n in range(len(chosen))),
        tuple(wording.cautions(attribution)),
        tuple(queries),
        tuple(next_steps(attribution, queries, agreed)),
        agreed,
        sources,
    )


def _on_query(one: Attribution, position: int, tests: Sequence[Tested], k: int, listed: int | None) -> QueryFindings:
    name, number = one.gallery.query(one.queries[0]), one.queries[0]
    return QueryFindings(
        position,
        name.name or f"query {number}",
        name,
        wording.as_trained(one.measurement, one.baseline[:, 0]),
        tuple(_ranked(one, each, k, listed) for each in tests),
    )


def _ranked(one: Attribution, tests: Tested, k: int, listed: int | None) -> Ranked:
    difference, runs = tests.difference, len(one.runs)
    rows = top_examples(one, 0, difference, k, tests, listed)
    said = [verdict(one, tests.outcome), retraining_verdict(one, rows)]
    return Ranked(
        difference,
        wording.describe(difference, one.measurement, wording.noun(one)),
        tests.outcome,
        " ".join(filter(None, said)),
        tuple(rows),
        tuple(_card(one, row, difference) for row in rows[:MOST_CARDS]),
        difference.no_interval(runs),
        can_be_planned(difference, runs),
    )


def _card(one: Attribution, row: TopExample, difference: Difference) -> Card:
    members = one.members
    if members is None:
        shown: tuple[Shown, ...] = (one.gallery.example(row.position),)
        title = shown[0].name or f"example {row.name}"
    else:
        shown = tuple(one.gallery.example(member) for member in members[row.position][:MOST_MEMBERS])
        title = f"{row.name} ({wording.counted(row.size, 'example')})"
    return Card(row, title, shown, wording.effect(difference, one.measurement, row))


def _leaves_range(one: Attribution) -> bool:
    """Return whether a prediction on the query is out of the measurement's range in some run."""
    low, high = one.known_range
    if low == -torch.inf and high == torch.inf:
        return False
    outside: Tensor = one.out_of_range()
    return bool((outside > 0).any())
