"""Is it real? Tests of all removals on one query, and the uncertainty of the few that are shown."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_dtda.attribution.attribution import Attribution
from lightning_dtda.statistics import significance
from lightning_dtda.statistics.differences import DIFFERENCES, Difference, resolve_difference
from lightning_dtda.statistics.power import retrainings_needed, runs_for_significance

FDR = 0.05
"""False discovery rate: the expected share without an effect among the removals called significant for a query."""

LEVEL = 0.95
"""Confidence level of the intervals."""

POWER = 0.8
"""Probability that the suggested number of runs or retrainings shows the effect; 80 % is customary in planning."""


@dataclass(frozen=True, eq=False)
class Tested:
    """The tests of every removal for one difference, on one query.

    Args:
        difference: The difference that is tested.
        runs: Number of runs.
        least_runs: Number of runs that the test needs.
        p_values: p-values ``(removals,)``; NaN if there are too few runs.
        significant: Whether each removal is significant at a false discovery rate of :data:`FDR` ``(removals,)``.
    """

    difference: Difference
    runs: int
    least_runs: int
    p_values: Tensor
    significant: Tensor

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
    def runs_for_clearest(self) -> float:
        """Total number of runs at which the clearest would be significant, if its effect is as large as estimated."""
        level = FDR / len(self.p_values)
        clearest = self.p_values[self.clearest]
        return float(runs_for_significance(self.difference, clearest, self.runs, level, POWER))


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
    return Tested(chosen, runs, least, p, significance.discoveries(p, FDR))


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


def retrainings(selected: Attribution, difference: Difference, positions: list[int]) -> Tensor | None:
    """Return the number of retrainings, with and without, that would show each removal's effect ``(positions,)``.

    Only the mean and the variance have a formula. The others would have to be simulated, which takes seconds each, and
    what changes them usually shows in the mean or the variance. ``None`` for those, and with a single run.
    """
    if len(difference.moments) != 1 or len(selected.runs) < 2:
        return None
    return retrainings_needed(difference, *_samples(selected, positions), power=POWER, alpha=1 - LEVEL).cpu()


def _samples(selected: Attribution, positions: list[int]) -> tuple[Tensor, Tensor]:
    baseline = selected.baseline[:, :1].double()
    return baseline, baseline + selected.responses[:, 0, positions].double()
