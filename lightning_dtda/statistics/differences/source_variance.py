"""Change of the part of the variance that one source of randomness contributes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor
from typing_extensions import override

from lightning_dtda.errors import AttributionError
from lightning_dtda.statistics.differences.difference import Difference
from lightning_dtda.statistics.variance_components import (
    REST,
    Crossed,
    component_change_p_values,
    component_changes,
)

_SAID = {"initialisation": "initial parameters", "order": "order of the batches", "noise": "noise in training"}


class SourceVariance(Difference):
    r"""Change of one source's part of the variance, :math:`\sigma^2_a(Y) - \sigma^2_a(X)`, unbiased.

    It needs a crossed ensemble; see :class:`~lightning_dtda.recording.CrossedSeeds`. Negative for ``"order"``: without
    the examples, training depends less on the order of the batches. It has no interval, like :class:`Variance`.

    Args:
        source: ``"initialisation"``, ``"order"``, ``"noise"``, several of them joined by ``" and "`` for their
            interaction, or ``"rest"``; see :class:`~lightning_dtda.statistics.variance_components.Crossed`.

    Example:
        >>> import torch
        >>> seeds = {"initialisation": [0, 0, 1, 1], "order": [0, 1, 0, 1]}
        >>> x = torch.tensor([0.0, 1.0, 4.0, 5.0], dtype=torch.float64)
        >>> SourceVariance("initialisation").of_runs(seeds)(x, x / 2)
        tensor(-6., dtype=torch.float64)
    """

    name = "source_variance"
    formula = "part of Var Y \N{MINUS SIGN} part of Var X"
    meaning = "change of the {measurement}'s variance"
    unit = "the square of the {measurement}'s unit"
    crossed = True

    def __init__(self, source: str) -> None:
        what = _SAID.get(source, "rest" if source == REST else f"interaction of {source}")
        self.source = source
        self.name = f"{source.replace(' ', '_')}_variance"
        self.title = f"variance from the {what}"
        self.meaning = f"change of the {{measurement}}'s variance that comes from the {what}"
        self.reading = (
            f"Negative: without the {{removed}}, training depends less on the {what}. Positive: it depends more on it."
        )
        self._runs: Crossed | None = None
        self._number = 0

    @classmethod
    def names(cls, seeds: Mapping[str, Sequence[int]] | None) -> list[str]:
        """Return the names of the parts that runs with known seeds have; none if they are not crossed."""
        try:
            return [cls(part).name for part in Crossed.of(seeds or {}).parts]
        except AttributionError:
            return []

    @override
    def of_runs(self, seeds: Mapping[str, Sequence[int]] | None) -> SourceVariance:
        """Return the difference for runs with known seeds.

        Raises:
            AttributionError: If the seeds are not crossed, or the source is not one of those that vary.
        """
        bound = SourceVariance(self.source)
        bound._runs, bound._number = Crossed.of(seeds or {}), len(next(iter((seeds or {"": ()}).values())))
        if self.source not in bound._runs.parts:
            raise AttributionError(
                f"The variance has no part {self.source!r}. These runs vary {', '.join(bound._runs.parts[:-1])}; the "
                f"other part is {REST!r}."
            )
        return bound

    @override
    def __call__(self, baseline: Tensor, predicted: Tensor) -> Tensor:
        """Return the change of the component."""
        return component_changes(*self._arguments(baseline, predicted))[0]

    @override
    def standard_error(self, baseline: Tensor, predicted: Tensor) -> Tensor:
        """Return the standard error for Gaussian effects."""
        return component_changes(*self._arguments(baseline, predicted))[1]

    @override
    def p_values(self, baseline: Tensor, predicted: Tensor) -> Tensor:
        """Return p-values (:func:`~lightning_dtda.statistics.variance_components.component_change_p_values`)."""
        return component_change_p_values(*self._arguments(baseline, predicted))

    @override
    def no_interval(self, runs: int) -> str:
        """Return why there is none."""
        return "no method holds its level with few seeds of a source. Use the p-value."

    @property
    def least_runs_to_test(self) -> int:
        """Minimum number of runs: two seeds of two sources. A source with fewer than three has p-values of NaN."""
        return 4

    def _arguments(self, baseline: Tensor, predicted: Tensor) -> tuple[Crossed, Tensor, Tensor, int]:
        runs = self._runs
        if runs is None or len(predicted) != self._number:
            raise AttributionError(
                f"The {self.title} needs all runs of a crossed ensemble, each with the seeds of its sources. Compute "
                "it by Attribution.influence."
            )
        return runs, baseline.double(), predicted.double(), runs.parts.index(self.source)
