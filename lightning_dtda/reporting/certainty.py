"""Is it real? Tests of all removals on one query, and the uncertainty of the few that are shown."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from scipy import special
from torch import Tensor

from lightning_dtda.attribution.attribution import Attribution
from lightning_dtda.statistics import significance
from lightning_dtda.statistics.differences import DIFFERENCES, Difference, resolve_difference
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


@dataclass(frozen=True, eq=False)
class Tested:
    """The tests of every removal for one difference, on one query.

    Args:
        difference: The difference that is tested.
        runs: Number of runs.
        least_runs: Number of runs that the test needs.
        p_values: p-values ``(removals,)``; NaN if there are too few runs.
        significant: Whether each removal is significant at a false discovery rate of :data:`FDR` ``(removals,)``.
        silence: What is known about those that are not significant; ``None`` if all are, or if the difference has no
            interval.
    """

    difference: Difference
    runs: int
    least_runs: int
    p_values: Tensor
    significant: Tensor
    silence: Silence | None

    @property
    def possible(self) -> bool:
        """Whether there are enough runs for the test."""
        return self.runs >= self.least_runs

    @property
    def discoveries(self) -> int:
        """Number of significant removals."""
        return int(self.significant.sum())

    @property
    def clearest(self) -> int:
        """Position of the removal with the smallest p-value."""
        return int(self.p_values.nan_to_num(1.0).argmin())

    @property
    def runs_for_clearest(self) -> tuple[float, float]:
        """Ends of the range of the total number of runs at which the clearest would be significant.

        The range holds for every removal at once, so also for one that is chosen because it looks clearest.
        """
        number, clearest = len(self.p_values), self.p_values[self.clearest]
        level = 1 - (1 - PLANNING) / number
        low, _, high = runs_for_significance(self.difference, clearest, self.runs, FDR / number, POWER, level).tolist()
        return low, high


def tested(selected: Attribution, difference: str | Difference) -> Tested:
    """Test every removal of an attribution of one query.

    Args:
        selected: The attribution, restricted to the runs to use.
        difference: The difference to test.
    """
    chosen, runs = resolve_difference(difference), len(selected.runs)
    least = chosen.least_runs_to_test
    if runs < least:
        p = torch.full(selected.responses.shape[2:], torch.nan, dtype=torch.float64)
    else:
        p = selected.p_values(chosen)[0].cpu()
    significant = significance.discoveries(p, FDR)
    return Tested(chosen, runs, least, p, significant, _silence(selected, chosen, significant))


def _silence(selected: Attribution, difference: Difference, significant: Tensor) -> Silence | None:
    runs, alpha = len(selected.runs), FDR / len(significant)
    if not difference.signed or difference.no_interval(runs) or significant.all():
        return None
    freedom = difference.freedom(runs)
    estimates, errors = (of(difference)[0].cpu() for of in (selected.influence, selected.standard_error))
    negligible = math.nan
    if difference.relative:
        negligible = math.log1p(NEGLIGIBLE)
    elif difference.unit == DIFFERENCES["mean"].unit:
        negligible = NEGLIGIBLE * float(selected.baseline[:, 0].double().std())
    small = significance.discoveries(significance.equivalence_p_values(estimates, errors, freedom, negligible), FDR)
    none, unknown = small & ~significant, ~(small | significant)
    if not unknown.any():
        return Silence(negligible, int(none.sum()), 0, 0.0, 0.0)
    error, needed = float(errors[unknown].amax()), math.inf
    if difference.moments == ("variance",):
        found_from = detectable_spread(error, runs, alpha, POWER)
    else:
        found_from = error * detectable(freedom, alpha, POWER)
    if difference.moments == ("mean",):
        # the largest standard error may be underestimated: by chi squared
        of_a_run = error * (runs * (runs - 1) / special.chdtri(runs - 1, (1 + PLANNING) / 2)) ** 0.5
        needed = float(runs_to_detect(torch.tensor(negligible / of_a_run), alpha, POWER))
    return Silence(negligible, int(none.sum()), int(unknown.sum()), found_from, needed)


def intervals(selected: Attribution, difference: Difference, positions: list[int]) -> Tensor:
    """Return intervals of a few removals' influences on one query ``(2, positions)``; NaN if there are none.

    From the responses of these removals: not for all, and not from the rounded figures of kept attributions.
    """
    return difference.interval(*_samples(selected, positions), LEVEL).cpu()


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
    ends = retrainings_needed(difference, *_samples(selected, positions), POWER, 1 - LEVEL, level)
    return ends[[0, 2]].cpu()


def _samples(selected: Attribution, positions: list[int]) -> tuple[Tensor, Tensor]:
    baseline = selected.baseline[:, :1].double()
    return baseline, selected._predicted(baseline, selected.responses[:, 0, positions].double())
