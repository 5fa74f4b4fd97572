"""Change of the mean over runs of which some share seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor
from typing_extensions import override

from lightning_dtda.errors import AttributionError
from lightning_dtda.statistics.differences.difference import Difference
from lightning_dtda.statistics.variance_components import Crossed, mean_variance


class CrossedMean(Difference):
    r"""Change of the mean over a crossed ensemble: :class:`Mean` with the standard error of runs that share seeds.

    Its variance is :func:`~lightning_dtda.statistics.variance_components.mean_variance`. Student's t has
    :math:`\min(I, J) - 1` degrees of freedom, as for the runs that share no seed; with those of Satterthwaite, tests at
    0.05 % found a mean where there was none in up to 0.6 % of simulated ensembles of 4 x 16 runs. In simulations with 4
    to 16 seeds of a source, tests at 5 % found one in at most 5.4 % of cases for Gaussian effects and for Student's t,
    and in up to 13 % for exponential ones, as tests of the runs that share no seed in up to 11 %
    (``benchmarks/variance_by_source.py``). Unless the source with the fewest seeds dominates, they find one far more
    rarely, and have less power: a source with two seeds leaves one degree of freedom, whatever the others have.
    :meth:`Mean.of_runs` makes it.

    Args:
        crossed: The complete grid, from which the components are estimated.
        seeds: Seed of each source in each run, also of runs outside of the grid.
    """

    name = "mean"
    title = "mean influence"
    formula = "E Y \N{MINUS SIGN} E X"
    meaning = "change of the mean {measurement}"
    unit = "the {measurement}'s unit"
    least_runs = 4
    paired = True
    crossed = True

    def __init__(self, crossed: Crossed, seeds: Mapping[str, Sequence[int]]) -> None:
        self._crossed = crossed
        self._seeds = seeds

    @override
    def __call__(self, baseline: Tensor, predicted: Tensor) -> Tensor:
        return self._changes(baseline, predicted).mean(0)

    @override
    def standard_error(self, baseline: Tensor, predicted: Tensor) -> Tensor:
        """Return the standard error of the mean response."""
        return mean_variance(self._crossed, self._changes(baseline, predicted), self._seeds).sqrt()

    @override
    def freedom(self, runs: int) -> float:
        """Return the degrees of freedom of the source with the fewest seeds."""
        return min(self._crossed.shape) - 1

    @property
    def least_runs_to_test(self) -> int:
        """Minimum number of runs: two seeds of two sources."""
        return 4

    def _changes(self, baseline: Tensor, predicted: Tensor) -> Tensor:
        number = len(next(iter(self._seeds.values())))
        if len(predicted) != number:
            raise AttributionError(f"The mean over crossed runs needs all {number} runs, not {len(predicted)}.")
        return (predicted - baseline).double()
