"""Change of the mean: does the measurement move?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from torch import Tensor
from typing_extensions import override

from lightning_dtda.errors import AttributionError
from lightning_dtda.statistics.differences.crossed_mean import CrossedMean
from lightning_dtda.statistics.differences.difference import Difference, Moment
from lightning_dtda.statistics.variance_components import Crossed

Location = Literal["mean", "median", "trimmed"]


class Mean(Difference):
    r"""Change of the mean, :math:`E Y - E X`.

    In the measurement's unit. Positive: removing the examples raises the measurement. (In the paper, arXiv 2506.12965,
    definition 1, the mean alone has the opposite sign, :math:`E X - E Y`; here every influence is a change by removal.)

    Args:
        location: How to summarize the shifts of the runs: by their ``"mean"``, their ``"median"``, or the mean without
            the largest and the smallest fifth, ``"trimmed"`` (Wilcox, *Introduction to Robust Estimation and Hypothesis
            Testing*, 2012, section 3.3). The last two are robust to a few outlying runs.

    Raises:
        AttributionError: If the location is unknown.

    Example:
        >>> import torch
        >>> Mean()(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 2.0]))
        tensor(-1.)
        >>> Mean("median")(torch.zeros(3), torch.tensor([-1.0, -2.0, 90.0]))
        tensor(-1.)
    """

    name = "mean"
    formula = "E Y \N{MINUS SIGN} E X"
    meaning = "change of the mean {measurement}"
    unit = "the {measurement}'s unit"

    def __init__(self, location: Location = "mean") -> None:
        if location not in get_args(Location):
            raise AttributionError(f"location={location!r}; choose from {', '.join(get_args(Location))}.")
        self.location = location
        self.moments: tuple[Moment, ...] = ("mean",) if location == "mean" else ()
        self.smooth, self.paired = location != "median", location != "mean"
        if location == "median":
            self.name, self.formula = "median", "median of Y \N{MINUS SIGN} X"
            self.meaning = "change of the {measurement}, median over runs,"
        if location == "trimmed":
            self.name, self.title = "trimmed_mean", "trimmed mean influence"
            self.formula = "trimmed mean of Y \N{MINUS SIGN} X"
            self.meaning = "change of the {measurement}, mean over runs without the fifths that change most and least,"

    @override
    def of_runs(self, seeds: Mapping[str, Sequence[int]] | None) -> Difference:
        """Return the change of the mean for crossed runs, if most of them combine each seed with each."""
        if type(self) is not Mean or self.location != "mean" or not seeds:
            return self
        try:
            crossed = Crossed.of(seeds)
        except AttributionError:
            return self
        combined = set(zip(*seeds.values(), strict=True))
        varied = {source for source, of_source in seeds.items() if len(set(of_source)) > 1}
        # of a source that varies outside of the grid only, the component is not known
        known = varied == set(crossed.sources) and 2 * len(crossed.runs) > len(combined)
        return CrossedMean(crossed, seeds) if known else self

    def standard_error(self, baseline: Tensor, predicted: Tensor) -> Tensor:
        """Return the standard error of the mean response, or that of the location.

        For a trimmed mean, from the samples in which those cut off are replaced by the nearest that are not (Yuen,
        *Biometrika* 61, 1974).
        """
        runs, cut = len(predicted), self._cut(len(predicted))
        if self.location == "median":
            return super().standard_error(baseline, predicted)
        changes = predicted - baseline
        if self.location == "trimmed":
            ordered = changes.sort(0).values
            changes = changes.clamp(ordered[cut], ordered[runs - 1 - cut])
        left = runs - 2 * cut
        return ((changes - changes.mean(0)).square_().sum(0) / (left * (left - 1))).sqrt()

    def freedom(self, runs: int) -> float:
        """Return the degrees of freedom of Student's t; a median of fewer than 4 runs is tested by exchange."""
        return 0 if self.location == "median" and runs < 4 else runs - 2 * self._cut(runs) - 1

    def _cut(self, runs: int) -> int:
        """Return how many runs are cut off at each end."""
        return runs // 5 if self.location == "trimmed" else 0

    def __call__(self, baseline: Tensor, predicted: Tensor) -> Tensor:
        """Return ``E Y - E X``, or the location of ``Y - X`` over runs."""
        if self.location == "mean" and len(predicted) != len(baseline):
            return predicted.mean(0) - baseline.mean(0)
        changes = predicted - baseline
        if self.location == "mean":
            return changes.mean(0)
        if self.location == "median":
            return changes.quantile(0.5, dim=0)
        cut = self._cut(len(changes))
        return changes.sort(0).values[cut : len(changes) - cut].mean(0)
