"""Measured and predicted samples with and without removals, and the influences that follow from them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lightning_dtda.errors import AttributionError
from lightning_dtda.statistics.differences import Difference


@dataclass(frozen=True, eq=False)
class Samples:
    """What a prediction is compared with: samples along the first dimension, float64.

    Args:
        predicted: m of each run with the predicted change ``(runs, queries, removals)``.
        baseline: m of each run ``(runs, queries, 1)``.
        real: m of models trained without the removed examples ``(seeds, queries, removals)``.
        real_baseline: m of models trained on everything ``(baseline seeds, queries, 1)``.
        paired: Whether the seeds of ``real`` are those of ``real_baseline``, in the same order.
    """

    predicted: Tensor
    baseline: Tensor
    real: Tensor
    real_baseline: Tensor
    paired: bool = False

    def predicted_influence(self, difference: Difference, runs: Tensor | None = None) -> Tensor:
        """Return the difference that is predicted.

        Args:
            difference: The difference.
            runs: Positions of the runs that are taken ``(taken, ...)``; ``None`` is each once.

        Returns:
            ``(..., queries, removals)``.
        """
        if runs is None:
            return difference(self.baseline, self.predicted)
        return difference(self.baseline[runs], self.predicted[runs])

    def real_influence(
        self, difference: Difference, seeds: Tensor | None = None, baseline_seeds: Tensor | None = None
    ) -> Tensor:
        """Return the difference that retraining shows.

        Args:
            difference: The difference.
            seeds: Positions of the seeds that are taken ``(taken, ...)``, of all removals alike: seeds may be shared by
                the removals, and noise in common leaves their order as it is.
            baseline_seeds: The same of the baseline; not looked at if the seeds are paired.

        Returns:
            ``(..., queries, removals)``.
        """
        baseline, real = self.real_baseline, self.real
        if seeds is not None:
            baseline, real = baseline[seeds if self.paired else baseline_seeds], real[seeds]
        return difference(baseline, real)


def arrange(predicted: Tensor, baseline: Tensor, real: Tensor, real_baseline: Tensor) -> tuple[Tensor, ...]:
    """Check samples, and put the queries first.

    Args:
        predicted: ``(removals, runs, queries)``.
        baseline: ``(runs, queries)``.
        real: ``(removals, seeds, queries)``.
        real_baseline: ``(baseline seeds, queries)``.

    Returns:
        The same, as ``(queries, runs, removals)``, ``(queries, runs)``, ``(queries, seeds, removals)`` and
        ``(queries, baseline seeds)``.

    Raises:
        AttributionError: If shapes do not fit, or a value is not finite.
    """
    named = {"predicted": predicted, "baseline": baseline, "real": real, "real_baseline": real_baseline}
    for (name, tensor), dimensions in zip(named.items(), (3, 2, 3, 2), strict=True):
        if tensor.ndim != dimensions:
            shape = "(removals, samples, queries)" if dimensions == 3 else "(samples, queries)"
            raise AttributionError(f"{name} has shape {tuple(tensor.shape)}; give {shape}.")
        if not tensor.is_floating_point():
            raise AttributionError(f"{name} is {tensor.dtype}; give measurements in floating point.")
        if not tensor.isfinite().all():
            raise AttributionError(
                f"{name} holds values that are not finite: trainings that diverged, or are missing. Leave them out "
                "(of a GroundTruth: truth.finished())."
            )
    if predicted.shape[1:] != baseline.shape:
        raise AttributionError(
            f"predicted {tuple(predicted.shape)} and baseline {tuple(baseline.shape)} must be of the same runs and "
            "queries, (removals, runs, queries) and (runs, queries)."
        )
    if len(predicted) != len(real):
        raise AttributionError(f"{len(predicted)} removals are predicted, and {len(real)} were retrained.")
    if len({tensor.shape[-1] for tensor in named.values()}) != 1:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in named.items())
        raise AttributionError(f"The last dimension is that of the queries, the same in all: {shapes}.")
    return predicted.permute(2, 1, 0), baseline.T, real.permute(2, 1, 0), real_baseline.T


def collect(arranged: tuple[Tensor, ...], paired: bool = False) -> Samples:
    """Return the samples of all queries, from what :func:`arrange` returned.

    Raises:
        AttributionError: If there are fewer than two removals or no query, or the seeds cannot be pairs.
    """
    predicted, baseline, real, real_baseline = arranged
    queries, seeds, removals = real.shape
    if removals < 2 or queries < 1:
        raise AttributionError(
            f"There are {removals} removals and {queries} queries. A correlation over removals needs two of them, and "
            "tens to mean much."
        )
    if paired and real_baseline.shape[1] != seeds:
        raise AttributionError(
            f"paired=True, and there are {real_baseline.shape[1]} baseline seeds for {seeds} seeds. Give the baseline "
            "of the same seeds, or paired=False."
        )
    return Samples(
        predicted.movedim(1, 0).double(),
        baseline.T[..., None].double(),
        real.movedim(1, 0).double(),
        real_baseline.T[..., None].double(),
        paired,
    )


def check_samples(samples: Samples, difference: Difference) -> None:
    """Refuse fewer samples than a difference needs, or other numbers.

    Raises:
        AttributionError: Naming what there is too little of.
    """
    seeds, baseline_seeds = len(samples.real), len(samples.real_baseline)
    if difference.paired and seeds != baseline_seeds:
        raise AttributionError(
            f"The {difference.name} influence compares run by run, and there are {baseline_seeds} baseline seeds for "
            f"{seeds} seeds. Retrain with as many of one as of the other."
        )
    for what, tensor, more in (
        ("runs", samples.baseline, "Record more seeds"),
        ("seeds", samples.real, "Retrain with more seeds"),
        ("baseline seeds", samples.real_baseline, "Retrain with more baseline seeds"),
    ):
        if len(tensor) < difference.least_runs:
            raise AttributionError(
                f"The {difference.name} influence needs {difference.least_runs} {what}; there are {len(tensor)}. "
                f"{more}."
            )
