"""Is it real? The tests of all removals on one query, and how sure the few are that are shown."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_dtda.attribution.attribution import Attribution
from lightning_dtda.statistics import significance
from lightning_dtda.statistics.differences import Difference, resolve_difference
from lightning_dtda.statistics.intervals import bootstrap_interval
from lightning_dtda.statistics.power import retrainings_needed, runs_for_significance

FDR = 0.05
"""Of the removals that a query's tables and figures call significant, this share has no effect, on average."""

LEVEL = 0.95
"""Confidence of the intervals."""

POWER = 0.8
"""Probability with which the runs or retrainings that are said to show an effect do, as is usual in planning."""

REPLICATES = 1000
"""Draws for each interval: 25 of them are beyond each end."""


@dataclass(frozen=True, eq=False)
class Tested:
    """The tests of one difference between a query's distributions, with and without each removal.

    Args:
        difference: What is tested.
        runs: Number of runs.
        least_runs: How many the test needs.
        p_values: ``(removals,)``; NaN where there are too few runs.
        significant: Which are told from seed noise, at a false discovery rate of :data:`FDR` ``(removals,)``.
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
        """How many removals are significant."""
        return int(self.significant.sum())

    @property
    def clearest(self) -> int:
        """Position of the removal with the smallest p-value."""
        return int(self.p_values.nan_to_num(1.0).argmin())

    @property
    def runs_for_clearest(self) -> float:
        """With how many runs in all the clearest would be significant, if its effect is as large as it seems."""
        level = FDR / len(self.p_values)
        clearest = self.p_values[self.clearest]
        return float(runs_for_significance(self.difference, clearest, self.runs, level, POWER))


def tested(selected: Attribution, difference: str | Difference) -> Tested:
    """Test every removal of an attribution of one query.

    Args:
        selected: The attribution, of the runs that are to be tested.
        difference: What is tested.
    """
    chosen, runs = resolve_difference(difference), len(selected.runs)
    least = significance.least_runs(chosen)
    if runs < least:
        p = torch.full(selected.responses.shape[2:], torch.nan, dtype=torch.float64)
    else:
        p = selected.p_values(chosen)[0].cpu()
    return Tested(chosen, runs, least, p, significance.discoveries(p, FDR))


def intervals(selected: Attribution, difference: Difference, positions: list[int]) -> Tensor:
    """Return bootstrap intervals of a few removals' influences on one query ``(2, positions)``; NaN with a run too few.

    As :meth:`Attribution.interval` gives for all, of which each costs :data:`REPLICATES` differences.
    """
    baseline, predicted = _samples(selected, positions)
    if len(selected.runs) <= max(difference.least_runs, 1):
        return torch.full((2, len(positions)), torch.nan, dtype=torch.float64)
    return bootstrap_interval(difference, baseline, predicted, LEVEL, REPLICATES).cpu()


def retrainings(selected: Attribution, difference: Difference, positions: list[int]) -> Tensor | None:
    """Return how many retrainings, with and without, would show a few removals' effects on one query ``(positions,)``.

    Only of the mean and the variance, which have a formula; a simulation of the others takes seconds each, and what
    changes them shows in one of these. ``None`` for the others, or with a run too few.
    """
    if len(difference.moments) != 1 or len(selected.runs) < 2:
        return None
    return retrainings_needed(difference, *_samples(selected, positions), power=POWER, alpha=1 - LEVEL).cpu()


def _samples(selected: Attribution, positions: list[int]) -> tuple[Tensor, Tensor]:
    baseline = selected.baseline[:, :1].double()
    return baseline, baseline + selected.responses[:, 0, positions].double()
