"""How far a replay is from its record, and when it no longer counts as a replay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_dtda.errors import ReplayError
from lightning_dtda.replay.kernels import rounds_products
from lightning_dtda.trajectory import Run

_ROUNDING_STEPS = 16
"""Rounding allowed per step, in units in the last place: a replay with other kernels rounds differently."""


_KINKS = 1e-2
"""Largest relative difference of a gradient that kinks can explain: other kernels may round an input to the other side.

A GPT of 0.8 million parameters reached 1.3e-3. Anything larger has another cause, such as dropout that other kernels
draw differently."""


_OTHER_PRECISION = 4e-3
"""Additional tolerance, relative to the distance travelled, for a replay in another precision. Inputs close to a kink
fall on its other side. The GPT reached 8e-4 over stretches of 8 steps with AdamW; a changed label in a batch of 64
causes at least ten times that."""


_MIXED = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
"""Data type of the low-precision parts of a training with mixed precision. Replays do not round that coarsely."""


_TEN_BITS = 2.0**-10
"""Unit in the last place of products that GPUs round to ten bits (TF32)."""


_REASONS = (
    "The data or the module changed, or training_step depends on something that is not recorded. If the data set is "
    'random, record again with TrajectoryRecorder(batches="store").'
)


@dataclass(frozen=True)
class Drift:
    """Largest deviations of the replay of a run from its record.

    Args:
        parameters: Largest distance between rebuilt and recorded parameters at the end of a stretch, divided by the
            norm of the recorded ones. If the optimizer divides gradients by something, both are multiplied by it first:
            with Adam, for example, rounding alone moves a parameter whose gradient is close to zero, so its
            difference should count little.
        gradients: Largest distance between a recomputed and the recorded gradient, divided by the norm of the recorded
            one; ``None`` if no gradients were recorded.
    """

    parameters: float
    gradients: float | None


@dataclass(frozen=True)
class Recorded:
    """The record of a range of steps of R runs, to compare a replay with.

    Args:
        first: First step.
        last: Step after the last.
        start: Parameters that the replay started from ``(runs, P)``.
        end: Recorded parameters at the end ``(runs, P)``.
        preconditioner: Factors by which the optimizer multiplied gradients at the end ``(runs, P)``; ``None`` for
            ones.
    """

    first: int
    last: int
    start: Tensor
    end: Tensor
    preconditioner: Tensor | None = None

    def distances(self, rebuilt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the norms ``(runs,)`` of the difference at the end, the distance travelled, and the parameters."""
        found = [rebuilt - self.end, self.end - self.start, self.end]
        if self.preconditioner is not None:
            # in units of the gradient, scaled so that the largest factor is 1
            scale = self.preconditioner.reciprocal()
            scale = scale / scale.amax(1, keepdim=True).clamp_min(torch.finfo(scale.dtype).tiny)
            found = [part * scale for part in found]
        difference, travelled, size = (part.norm(dim=1) for part in found)
        return difference, travelled, size


class RecordComparison:
    """Compares a replay of stacked runs with its record, and keeps the largest differences.

    Args:
        names: Name of each of R runs for error messages.
        precision: Precision of the Trainer.
        recorded: Data type of the recorded parameters.
        gradients: Data type of the recorded gradients; ``None`` if there are none.
        tolerance: Tolerance as for :class:`~lightning_dtda.replay.Replay`.
        dtype: Data type of the replay.
        device: Device of the replay.
        reasons: Possible reasons for a difference, and what to do about them, for error messages.
    """

    def __init__(
        self,
        names: Sequence[str],
        precision: str,
        recorded: torch.dtype,
        gradients: torch.dtype | None,
        tolerance: float,
        dtype: torch.dtype,
        device: torch.device,
        reasons: str = _REASONS,
    ) -> None:
        mixed = _MIXED.get(precision)
        self._names = names
        self._reasons = reasons
        self._recorded_dtype = recorded
        coarse = 0.0 if mixed is None else torch.finfo(mixed).eps
        if rounds_products(recorded, device):
            coarse = max(coarse, _TEN_BITS)
        self._tolerance = tolerance + _ROUNDING_STEPS * coarse
        self._of_parameters = self._tolerance + (0.0 if dtype == recorded else _OTHER_PRECISION)
        self._records_gradients = gradients is not None
        self._stored_eps = 0.0 if gradients is None else torch.finfo(gradients).eps
        self._parameter_drift = torch.zeros(len(names), dtype=dtype, device=device)
        self._gradient_drift = torch.zeros_like(self._parameter_drift)

    @classmethod
    def of_runs(
        cls, runs: Sequence[Run], tolerance: float, dtype: torch.dtype, device: torch.device
    ) -> RecordComparison:
        """Compare with the records of R runs."""
        manifest = runs[0].manifest
        gradients = None if manifest.gradients == "none" else getattr(torch, manifest.gradients)
        precision = manifest.configuration["training"]["precision"]
        names = [str(run.path) for run in runs]
        tolerance += runs[0].update.update.rounding
        return cls(names, precision, manifest.torch_dtype, gradients, tolerance, dtype, device)

    @property
    def drift(self) -> tuple[Drift, ...]:
        """Largest deviation of each run's replay from its record so far."""
        gradients = self._gradient_drift.tolist() if self._records_gradients else [None] * len(self._names)
        return tuple(map(Drift, self._parameter_drift.tolist(), gradients))

    def reproduced(self, recorded: Recorded, rebuilt: Tensor) -> Tensor:
        """Return whether rebuilt parameters ``(runs, P)`` match the record up to rounding ``(runs,)``."""
        difference, travelled, size = recorded.distances(rebuilt)
        rounding = _ROUNDING_STEPS * (recorded.last - recorded.first) ** 0.5 * torch.finfo(self._recorded_dtype).eps
        # a huge tolerance lets everything pass, even where nothing moved; also false for NaN
        return difference <= self._of_parameters * (travelled + rounding * size) + rounding * size

    def parameters(self, recorded: Recorded, rebuilt: Tensor) -> None:
        """Compare rebuilt parameters ``(runs, P)`` with the recorded ones.

        Raises:
            ReplayError: If they differ by more than rounding. The message names the run.
        """
        difference, travelled, size = recorded.distances(rebuilt)
        relative = difference / size.clamp_min(torch.finfo(self._recorded_dtype).eps)
        torch.maximum(self._parameter_drift, relative, out=self._parameter_drift)
        within = self.reproduced(recorded, rebuilt)
        if not bool(within.all()):
            number = int((~within).nonzero()[0])
            raise ReplayError(
                f"{self._names[number]} is not reproduced between step {recorded.first} and step {recorded.last}: "
                f"the parameters differ by {difference[number]:.2g} after travelling {travelled[number]:.2g} "
                f"(tolerance: {self._of_parameters:g} of that distance). {self._reasons}"
            )

    def gradient(
        self, step: int, computed: Tensor, expected: Tensor, again: Callable[[], Tensor] | None = None
    ) -> None:
        """Compare the gradient of a step ``(runs, P)`` with its expected value.

        Args:
            step: Step t.
            computed: Gradient computed with kernels that can be differentiated twice.
            expected: Expected gradient.
            again: Function that recomputes the gradient with the kernels of the training. Other kernels round
                differently, which may put an input on the other side of a kink (of a ReLU, say) and make the gradients
                differ by more than rounding.

        Raises:
            ReplayError: If they differ by more than rounding. The message names the run.
        """
        relative, within = self._within(computed, expected)
        if not within and again is not None and bool((relative <= _KINKS).all()):
            relative, within = self._within(again(), expected)
        torch.maximum(self._gradient_drift, relative, out=self._gradient_drift)
        if not within:
            number = int(relative.nan_to_num(torch.inf).argmax())
            raise ReplayError(
                f"{self._names[number]}: the gradient of step {step} is not the recorded one (relative difference "
                f"{relative[number]:.2g}, tolerance {self._tolerance:g}). {self._reasons}"
            )

    def _within(self, computed: Tensor, expected: Tensor) -> tuple[Tensor, bool]:
        """Return the relative differences ``(runs,)``, and whether all of them are within rounding."""
        difference, size = (computed - expected).norm(dim=1), expected.norm(dim=1)
        # a gradient that vanishes leaves only rounding noise, whose direction is meaningless
        floor = torch.finfo(self._recorded_dtype).eps
        within = bool((difference <= (self._tolerance + self._stored_eps) * size + floor).all())
        return difference / size.clamp_min(floor), within
