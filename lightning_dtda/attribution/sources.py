"""Crossed ensembles: the variance of a measurement split by the source of randomness that it comes from.

Functions of an attribution, and methods of :class:`~lightning_dtda.Attribution` by the same names.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_dtda.attribution.inference import check_share
from lightning_dtda.errors import AttributionError
from lightning_dtda.statistics.differences import Difference, SourceVariance, resolve_difference
from lightning_dtda.statistics.variance_components import Crossed, component_intervals, components
from lightning_dtda.trajectory.independence import independent_runs
from lightning_dtda.trajectory.traces import FIXED

if TYPE_CHECKING:
    from lightning_dtda.attribution.attribution import Attribution, Runs


@dataclass(frozen=True, eq=False)
class VarianceBySource:
    """Variance of a measurement over seeds, split by source.

    Args:
        parts: Names: each source, the interactions of some of three sources, and ``"rest"``: the interaction of all,
            and what has a seed of its own in each run.
        variance: Unbiased estimates ``(parts, queries)``, in the square of the measurement's unit; a small part may
            come out negative.
        interval: Lower and upper ends ``(2, parts, queries)``.
        seeds: Number of seeds of each source that were used.
        runs: Number of runs that were used.
    """

    parts: tuple[str, ...]
    variance: Tensor
    interval: Tensor
    seeds: dict[str, int]
    runs: int

    @property
    def share(self) -> Tensor:
        """Share of each part in the total variance ``(parts, queries)``, negative parts counting as zero."""
        positive = self.variance.clamp_min(0)
        return positive / positive.sum(0)


def seeds_of(attribution: Attribution) -> dict[str, list[int]] | None:
    """Return the seeds of each source in each run; ``None`` if not all runs have them, for the same sources.

    Sources whose seeds change nothing are left out: what an analysis of variance says of them is noise.
    """
    recorded = attribution.about.get("seeds", {})
    of_runs = [recorded.get(run, {}) for run in attribution.runs]
    if not of_runs[0] or any(of_run.keys() != of_runs[0].keys() for of_run in of_runs):
        return None
    fixed = attribution.about.get("fixed_sources", ())
    return {source: [of_run[source] for of_run in of_runs] for source in of_runs[0] if source not in fixed}


def sharing_a_seed(attribution: Attribution) -> bool:
    """Return whether two runs share the seed of a source, so they are not independent."""
    return len(_independent(attribution)) < len(attribution.runs)


def independent(attribution: Attribution) -> Attribution:
    """Return the attribution of runs of which no two share the seed of a source; itself if the ensemble is not crossed.

    Of a grid of 8 seeds of the initialisation and 8 of the order, these are 8 runs. Chaotic runs are not among them.
    """
    if not sharing_a_seed(attribution):
        return attribution
    trusted = attribution.trusted()
    return trusted._of(_independent(trusted))


def variance_by_source(
    attribution: Attribution,
    removed: Sequence[int | str] | None = None,
    level: float = 0.95,
    runs: Runs = "trusted",
) -> VarianceBySource:
    r"""Split the variance of the measurement over seeds by source, as trained or as predicted for a removal.

    .. math:: m^{(ij)} = \mu + a_i + b_j + e_{ij}, \qquad
        \mathrm{Var}\, m = \sigma^2_a + \sigma^2_b + \sigma^2_e

    with the effects of the initialisation, a, of the order, b, and the rest; see
    :class:`~lightning_dtda.statistics.variance_components.Crossed` for more sources. Influences on a part are
    ``influence("order_variance")`` and so on: :class:`~lightning_dtda.statistics.SourceVariance`.

    Args:
        attribution: Attribution of a crossed ensemble; see :class:`~lightning_dtda.recording.CrossedSeeds`. Where a run
            is missing, all runs with one of its seeds are left out.
        removed: Training examples, or groups, that are removed together; ``None``: as trained.
        level: Confidence level of the intervals.
        runs: As for :meth:`Attribution.influence`.

    Raises:
        AttributionError: If the ensemble is not crossed, all but one of its sources change nothing, or the level is not
            between 0 and 1.

    Example:
        >>> import torch
        >>> from lightning_dtda import Attribution
        >>> runs = ("seed-0000", "seed-0001", "seed-1000", "seed-1001")
        >>> seeds = {run: {"initialisation": n % 2, "order": n // 2} for n, run in enumerate(runs)}
        >>> baseline = torch.tensor([[0.0], [4.0], [1.0], [5.0]])
        >>> found = Attribution(baseline, torch.zeros(4, 1, 1), runs, (0,), {"seeds": seeds}).variance_by_source()
        >>> dict(zip(found.parts, found.variance[:, 0].tolist()))
        {'initialisation': 8.0, 'order': 0.5, 'rest': 0.0}
    """
    check_share(level, "level")
    selected = attribution._selected(runs)
    with _naming_fixed(selected):
        crossed = Crossed.of(seeds_of(selected) or {})
    samples = (selected.baseline if removed is None else selected.predict(removed)).double()
    return VarianceBySource(
        parts=crossed.parts,
        variance=components(crossed, samples),
        interval=component_intervals(crossed, samples, level),
        seeds=dict(zip(crossed.sources, crossed.shape, strict=True)),
        runs=len(crossed.runs),
    )


@contextmanager
def _naming_fixed(attribution: Attribution) -> Iterator[None]:
    """Say in an error about the parts of the variance which sources have none."""
    try:
        yield
    except AttributionError as error:
        if not (fixed := attribution.about.get("fixed_sources")):
            raise
        reasons = " ".join(
            f"Runs that differ only in the seed of the {source} {FIXED[source]}, so it contributes nothing."
            for source in fixed
        )
        raise AttributionError(f"{reasons} {error}") from error


def resolved(attribution: Attribution, difference: str | Difference, infers: bool = False) -> Difference:
    """Return a difference by name for the runs of an attribution.

    Args:
        attribution: The attribution.
        difference: Name, import path or instance.
        infers: Whether it is used for inference from the runs to other seeds.

    Raises:
        AttributionError: As :func:`~lightning_dtda.statistics.resolve_difference`; or if runs share a seed and the
            difference takes them to be independent. Without inference, that of the mean is still right.
    """
    named = resolve_difference(difference)
    with _naming_fixed(attribution):
        chosen = named.of_runs(seeds_of(attribution))
    if not chosen.crossed and (infers or chosen.moments != ("mean",)):
        what = f"inference about the {chosen.name} influence" if infers else f"the {chosen.name} influence"
        refuse_crossed(attribution, what)
    return chosen


def refuse_crossed(attribution: Attribution, what: str) -> None:
    """Refuse runs that are not independent.

    Raises:
        AttributionError: If two runs share the seed of a source.
    """
    if sharing_a_seed(attribution):
        number, parts = len(_independent(attribution)), SourceVariance.names(seeds_of(attribution))
        instead = f"; or ask for a part of the variance, such as {parts[0]}" if parts else ""
        raise AttributionError(
            f"Runs of this crossed ensemble share seeds, but {what} needs independent ones. Take the {number} runs "
            f"that share none: attribution.independent(){instead}."
        )


def _independent(attribution: Attribution) -> list[int]:
    recorded, fixed = attribution.about.get("seeds", {}), attribution.about.get("fixed_sources", ())
    of_runs = [recorded.get(run) for run in attribution.runs]
    return independent_runs(
        [of_run and {source: seed for source, seed in of_run.items() if source not in fixed} for of_run in of_runs]
    )
