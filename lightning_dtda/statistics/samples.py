"""Measured and predicted samples with and without removals, and the influences computed from them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_dtda.errors import AttributionError
from lightning_dtda.statistics.differences import Difference


def as_array(tensor: Tensor) -> np.ndarray:
    """Return a tensor as an array; NumPy has no bfloat16, which becomes single precision."""
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).cpu().numpy()


@dataclass(frozen=True, eq=False)
class Samples:
    """Predicted and real samples, along the first dimension, in float64.

    Args:
        predicted: m of each run with the predicted change ``(runs, queries, removals)``.
        baseline: m of each run ``(runs, queries, 1)``.
        real: m of models trained without the removed examples ``(seeds, queries, removals)``.
        real_baseline: m of models trained on everything ``(baseline seeds, queries, 1)``.
        paired: Whether the seeds of ``real`` are those of ``real_baseline``, in the same order.
        repeated: Whether the seeds of ``real`` are the runs, in the same order: they are then drawn together.
    """

    predicted: Tensor
    baseline: Tensor
    real: Tensor
    real_baseline: Tensor
    paired: bool = False
    repeated: bool = False

    def predicted_influence(self, difference: Difference, runs: Tensor | None = None) -> Tensor:
        """Return the predicted difference.

        Args:
            difference: The difference.
            runs: Positions of the runs to use ``(taken, ...)``; ``None`` for each run once.

        Returns:
            ``(..., queries, removals)``.
        """
        if runs is None:
            return difference(self.baseline, self.predicted)
        return difference(self.baseline[runs], self.predicted[runs])

    def real_influence(
        self, difference: Difference, seeds: Tensor | None = None, baseline_seeds: Tensor | None = None
    ) -> Tensor:
        """Return the difference found by retraining.

        Args:
            difference: The difference.
            seeds: Positions of the seeds to use ``(taken, ...)``, the same for all removals: removals may share seeds,
                and shared noise leaves their order unchanged.
            baseline_seeds: Positions of the baseline seeds; ignored if the seeds are paired.

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
        predicted: Predicted samples without each removal ``(removals, runs, queries)``.
        baseline: Samples of the same runs ``(runs, queries)``.
        real: Samples of models trained without each removal ``(removals, seeds, queries)``.
        real_baseline: Samples of models trained on everything ``(baseline seeds, queries)``.

    Returns:
        The same tensors, as ``(queries, runs, removals)``, ``(queries, runs)``, ``(queries, seeds, removals)`` and
        ``(queries, baseline seeds)``.

    Raises:
        AttributionError: If shapes do not match, or a value is not finite.
    """
    named = {"predicted": predicted, "baseline": baseline, "real": real, "real_baseline": real_baseline}
    for (name, tensor), dimensions in zip(named.items(), (3, 2, 3, 2), strict=True):
        if tensor.ndim != dimensions:
            shape = "(removals, samples, queries)" if dimensions == 3 else "(samples, queries)"
            raise AttributionError(f"{name} has shape {tuple(tensor.shape)}; it must have shape {shape}.")
        if not tensor.is_floating_point():
            raise AttributionError(f"{name} is {tensor.dtype}; measurements must be floating-point.")
        if not tensor.isfinite().all():
            raise AttributionError(
                f"{name} contains values that are not finite: some trainings diverged or are missing. Leave them out "
                "(for a GroundTruth, use truth.finished())."
            )
    if predicted.shape[1:] != baseline.shape:
        raise AttributionError(
            f"predicted has shape {tuple(predicted.shape)} and baseline {tuple(baseline.shape)}. They must have the "
            "same runs and queries: (removals, runs, queries) and (runs, queries)."
        )
    if len(predicted) != len(real):
        raise AttributionError(
            f"There are predictions for {len(predicted)} removals, but {len(real)} were retrained. Give both for the "
            "same removals."
        )
    if len({tensor.shape[-1] for tensor in named.values()}) != 1:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in named.items())
        raise AttributionError(f"The last dimension, the queries, must be the same in all: {shapes}.")
    return predicted.permute(2, 1, 0), baseline.T, real.permute(2, 1, 0), real_baseline.T


def collect(arranged: tuple[Tensor, ...], paired: bool = False, repeated: bool = False) -> Samples:
    """Return the samples of all queries, from what :func:`arrange` returned.

    Raises:
        AttributionError: If there are fewer than two removals or no queries, or the seeds cannot be paired.
    """
    predicted, baseline, real, real_baseline = arranged
    queries, seeds, removals = real.shape
    if removals < 2 or queries < 1:
        raise AttributionError(
            f"There are {removals} removals and {queries} queries. A correlation over removals needs at least two "
            "removals (tens to be meaningful) and one query."
        )
    if paired and real_baseline.shape[1] != seeds:
        raise AttributionError(
            f"paired=True, but there are {real_baseline.shape[1]} baseline seeds for {seeds} seeds. Give the baseline "
            "of the same seeds, or paired=False."
        )
    return Samples(
        predicted.movedim(1, 0).double(),
        baseline.T[..., None].double(),
        real.movedim(1, 0).double(),
        real_baseline.T[..., None].double(),
        paired,
        repeated,
    )


def check_samples(samples: Samples, difference: Difference) -> None:
    """Check that there are enough samples for a difference, and that the seeds match if it is paired.

    Raises:
        AttributionError: If there are too few samples, or the numbers of seeds differ. The message names them.
    """
    seeds, baseline_seeds = len(samples.real), len(samples.real_baseline)
    if difference.paired and seeds != baseline_seeds:
        raise AttributionError(
            f"The {difference.name} influence compares run by run, but there are {baseline_seeds} baseline seeds for "
            f"{seeds} seeds. Retrain with the same number of both."
        )
    for what, tensor, more in (
        ("runs", samples.baseline, "Record more seeds"),
        ("seeds", samples.real, "Retrain with more seeds"),
        ("baseline seeds", samples.real_baseline, "Retrain with more baseline seeds"),
    ):
        if len(tensor) < difference.least_runs:
            raise AttributionError(
                f"The {difference.name} influence needs at least {difference.least_runs} {what}; there are "
                f"{len(tensor)}. {more}."
            )
