"""Is it real? Tests of all removals on one query, and the uncertainty of the few that are shown."""

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
"""False discovery rate: the expected share without an effect among the removals called significant for a query."""

LEVEL = 0.95
"""Confidence level of the intervals."""

POWER = 0.8
"""Probability that the suggested number of runs or retrainings shows the effect; 80 % is customary in planning."""

REPLICATES = 1000
"""Number of bootstrap replicates for each interval: 25 of them lie beyond each end."""


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
    least = significance.least_runs(chosen)
    if runs < least:
        p = torch.full(selected.responses.shape[2:], torch.nan, dtype=torch.float64)
    else:
        p = selected.p_values(chosen)[0].cpu()
    return Tested(chosen, runs, least, p, significance.discoveries(p, FDR))


def intervals(selected: Attribution, difference: Difference, positions: list[int]) -> Tensor:
    """Return bootstrap intervals of a few removals' influences on one query ``(2, positions)``; NaN with too few runs.

    The same as :meth:`Attribution.interval`, but not for all removals: each costs :data:`REPLICATES` differences.
    """
    baseline, predicted = _samples(selected, positions)
    if len(selected.runs) <= max(difference.least_runs, 1):
        return torch.full((2, len(positions)), torch.nan, dtype=torch.float64)
    return bootstrap_interval(difference, baseline, predicted, LEVEL, REPLICATES).cpu()


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
