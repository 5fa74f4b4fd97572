"""Is it real? Tests of all removals on one query, and the uncertainty of the few that are shown."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from scipy import special
from torch import Tensor

from lightning_dtda.attribution.attribution import Attribution
from lightning_dtda.attribution.inference import inferences
from lightning_dtda.statistics import significance
from lightning_dtda.statistics.differences import DIFFERENCES, Difference, Inference, resolve_difference
from lightning_dtda.statistics.power import (
    can_be_planned,
    detectable,
    detectable_spread,
    retrainings_needed,
    runs_for_significance,
    runs_to_detect,
)

FDR = 0.05
"""False discovery rate: the expected share without an effect among the removals called significant for a query."""

LEVEL = 0.95
"""Confidence level of the intervals."""

POWER = 0.8
"""Probability that the suggested number of runs or retrainings shows the effect; 80 % is customary in planning."""

PLANNING = 0.8
"""Confidence level of ranges of numbers of runs and retrainings: planning bears a higher risk than a claim does."""

NEGLIGIBLE = 0.1
"""Share of the standard deviation over seeds below which an effect is none for practical purposes: where the mean moves
by so little, the samples as trained and without the example overlap by 96 %."""

_AT_ONCE = 2**20
"""Number of responses of the queries that are tested at once."""


@dataclass(frozen=True)
class Silence:
    """What is known about the removals that are not significant, on one query.

    Args:
        negligible: Size below which effects are none for practical purposes: :data:`NEGLIGIBLE` standard deviations
            over seeds, or a change of it by that share, in the unit of the difference. NaN for differences in other
            units.
        none: Number of removals whose effects are smaller, at a false discovery rate of :data:`FDR`.
        unknown: Number of the others.
        found_from: Size at which the effect of any of these is found with a probability of :data:`POWER`.
        runs: Number of runs with which a negligible effect is found, an upper limit at a confidence level of 90 %;
            infinite if it is not known.
    """

    negligible: float
    none: int
    unknown: int
    found_from: float
    runs: float


@dataclass(frozen=True)
class Outcome:
    """What the tests of one difference on one query say of all removals together.

    Args:
        difference: The difference that was tested.
        runs: Number of runs.
        least_runs: Number of runs that the test needs.
        removals: Number of removals.
        discoveries: Number of significant removals.
        clearest: Position of the removal with the smallest p-value.
        clearest_p: Its p-value; NaN with too few runs.
        silence: What is known about those that are not significant; ``None`` if all are, or if the difference has no
            interval.
    """

    difference: Difference
    runs: int
    least_runs: int
    removals: int
    discoveries: int
    clearest: int
    clearest_p: float
    silence: Silence | None

    @property
    def possible(self) -> bool:
        """Whether there are enough runs for the test."""
        return self.runs >= self.least_runs

    @property
    def runs_for_clearest(self) -> tuple[float, float]:
        """Ends of the range of the total number of runs at which the clearest would be significant.

        The range holds for every removal at once, so also for one that is chosen because it looks clearest.
        """
        p, level = torch.tensor(self.clearest_p, dtype=torch.float64), 1 - (1 - PLANNING) / self.removals
        alpha = FDR / self.removals
        low, _, high = runs_for_significance(self.difference, p, self.runs, alpha, POWER, level).tolist()
        return low, high


@dataclass(frozen=True, eq=False)
class Tested:
    """The tests of every removal for one difference, on one query.

    Args:
        difference: The difference that is tested.
        runs: Number of runs.
        least_runs: Number of runs that the test needs.
        influence: Influences ``(removals,)``. As the other figures, float64, and NaN where it is unknown: with too few
            runs, or with ``keep_top`` for other differences than mean, variance and spread.
        standard_error: Their standard errors ``(removals,)``.
        interval: Lower and upper ends of their intervals over seeds ``(2, removals)``.
        p_values: p-values ``(removals,)``.
        q_values: Smallest false discovery rate at which each removal is significant ``(removals,)``, among all removals
            on the query (Benjamini and Hochberg); 1 where the p-value is NaN.
        silence: What is known about those that are not significant; ``None`` if all are, or if the difference has no
            interval.
    """

    difference: Difference
    runs: int
    least_runs: int
    influence: Tensor
    standard_error: Tensor
    interval: Tensor
    p_values: Tensor
    q_values: Tensor
    silence: Silence | None

    @property
    def significant(self) -> Tensor:
        """Whether each removal is significant at a false discovery rate of :data:`FDR` ``(removals,)``."""
        return self.q_values <= FDR

    @property
    def possible(self) -> bool:
        """Whether there are enough runs for the test."""
        return self.runs >= self.least_runs

    @property
    def discoveries(self) -> int:
        """Number of significant removals."""
        return int(self.significant.sum())

    @property
    def outcome(self) -> Outcome:
        """What the tests say of all removals together."""
        p = self.p_values.nan_to_num(1.0)
        clearest = int(p.argmin())
        return Outcome(
            self.difference,
            self.runs,
            self.least_runs,
            len(p),
            self.discoveries,
            clearest,
            float(self.p_values[clearest]),
            self.silence,
        )


def each_tested(attribution: Attribution, differences: Sequence[str | Difference]) -> Iterator[tuple[Tested, ...]]:
    """Yield, for one query after the other, the tests of every removal for each difference.

    Queries are tested in blocks of bounded memory, and differences together, as they share tests. A result takes 48
    bytes for each removal; it can be used and dropped before the next one.

    Args:
        attribution: The attribution, restricted to the runs to use.
        differences: The differences to test.
    """
    chosen, (runs, queries, removals) = list(map(resolve_difference, differences)), attribution.responses.shape
    size = max(1, _AT_ONCE // (runs * removals))
    for start in range(0, queries, size):
        block = attribution.select(range(start, min(start + size, queries)))
        found = inferences(block, chosen, LEVEL, runs="all")
        yield from zip(*(_tested(block, *each) for each in zip(chosen, found, strict=True)), strict=True)


def tested(selected: Attribution, difference: str | Difference) -> Tested:
    """Test every removal of an attribution of one query.

    Args:
        selected: The attribution, restricted to the runs to use.
        difference: The difference to test.
    """
    return next(each_tested(selected, [difference]))[0]


def _tested(block: Attribution, difference: Difference, found: Inference) -> Iterator[Tested]:
    """Yield the tests of each query of a block."""
    on_cpu = Inference(*(part.cpu() for part in found))
    q = significance.q_values(on_cpu.p_values)
    silences = _silences(block, difference, on_cpu, q <= FDR)
    parts = on_cpu.estimate, on_cpu.standard_error, on_cpu.interval.unbind(1), on_cpu.p_values, q, silences
    for each in zip(*parts, strict=True):
        yield Tested(difference, len(block.runs), difference.least_runs_to_test, *each)


def _silences(
    block: Attribution, difference: Difference, found: Inference, significant: Tensor
) -> list[Silence | None]:
    """Return what is known about the removals that are not significant, for each query."""
    queries, runs = len(block.queries), len(block.runs)
    if not difference.signed or difference.no_interval(runs):
        return [None] * queries
    freedom, negligible = difference.freedom(runs), torch.full((queries, 1), torch.nan, dtype=torch.float64)
    if difference.relative:
        negligible.fill_(math.log1p(NEGLIGIBLE))
    elif difference.unit == DIFFERENCES["mean"].unit:
        negligible = NEGLIGIBLE * block.baseline.double().std(0).cpu()[:, None]
    of_effects = found.estimate, found.standard_error, freedom
    none = significance.without_effect(*of_effects, negligible, significant, FDR)
    unknown = ~(none | significant)
    errors = found.standard_error.masked_fill(~unknown | found.standard_error.isnan(), -torch.inf).amax(1)
    rows = zip(negligible[:, 0].tolist(), none.sum(1).tolist(), unknown.sum(1).tolist(), errors.tolist(), strict=True)
    return [
        None if every else _silence(difference, runs, significant.shape[1], *row)
        for every, row in zip(significant.all(1).tolist(), rows, strict=True)
    ]


def _silence(
    difference: Difference, runs: int, removals: int, negligible: float, none: int, unknown: int, error: float
) -> Silence:
    """Return what is known about the removals that are not significant, on one query.

    Args:
        difference: The difference.
        runs: Number of runs.
        removals: Number of all removals.
        negligible: As in :class:`Silence`.
        none: As in :class:`Silence`.
        unknown: As in :class:`Silence`.
        error: Largest standard error among the unknown; -infinity if they are all NaN.
    """
    if not unknown:
        return Silence(negligible, none, 0, 0.0, 0.0)
    if error < 0:
        return Silence(negligible, none, unknown, math.inf, math.inf)
    alpha, needed = FDR / removals, math.inf
    if difference.moments == ("variance",):
        found_from = detectable_spread(error, runs, alpha, POWER)
    else:
        found_from = error * detectable(difference.freedom(runs), alpha, POWER)
    if difference.moments == ("mean",):
        # the largest standard error may be underestimated: by chi squared
        of_a_run = error * (runs * (runs - 1) / special.chdtri(runs - 1, (1 + PLANNING) / 2)) ** 0.5
        needed = float(runs_to_detect(torch.tensor(negligible / of_a_run), alpha, POWER))
    return Silence(negligible, none, unknown, found_from, needed)


def intervals(selected: Attribution, difference: Difference, positions: list[int]) -> Tensor:
    """Return intervals of a few removals' influences on one query ``(2, positions)``; NaN if there are none.

    From the responses of these removals: not for all, and not from the rounded figures of kept attributions.
    """
    return difference.interval(*samples(selected, positions), LEVEL).cpu()


def all_intervals(selected: Attribution, name: str) -> Tensor:
    """Return intervals of all removals' influences on one query ``(2, removals)``; NaN with too few runs."""
    if DIFFERENCES[name].no_interval(len(selected.runs)):
        return torch.full((2, selected.responses.shape[2]), torch.nan, dtype=torch.float64)
    return selected.interval(name, LEVEL, runs="all")[:, 0].cpu()


def retrainings(selected: Attribution, difference: Difference, positions: list[int]) -> Tensor:
    """Return how many retrainings, with and without, would show each removal's effect: a range ``(2, positions)``.

    The ranges hold for all removals at once, so also for those that are shown because they are the largest. NaN if
    there are too few runs, or no plan for the difference.
    """
    if not can_be_planned(difference, len(selected.runs)):
        return torch.full((2, len(positions)), torch.nan, dtype=torch.float64)
    level = 1 - (1 - PLANNING) / selected.responses.shape[2]
    ends = retrainings_needed(difference, *samples(selected, positions), POWER, 1 - LEVEL, level)
    return ends[[0, 2]].cpu()


def samples(selected: Attribution, positions: list[int]) -> tuple[Tensor, Tensor]:
    """Return the measurement of one query as trained ``(runs, 1)`` and without a few removals ``(runs, positions)``."""
    baseline = selected.baseline[:, :1].double()
    return baseline, selected._predicted(baseline, selected.responses[:, 0, positions].double())
