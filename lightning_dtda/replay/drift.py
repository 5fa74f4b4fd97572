"""How far a replay is from its record, and where it is no replay any more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_dtda.errors import ReplayError
from lightning_dtda.replay.kernels import rounds_products
from lightning_dtda.trajectory import Run

_ROUNDING_STEPS = 16
"""Units in the last place that a step may lose: a replay on other kernels than the training's rounds differently."""


_KINKS = 1e-2
"""How far, relatively, a gradient may be from its record by inputs that other kernels put on the other side of a kink.

A GPT of 0.8 million parameters had 1.3e-3. More is something else, dropout that other kernels draw otherwise, say."""


_OTHER_PRECISION = 4e-3
"""How much further from the record, relative to the distance travelled, a replay in another precision may come.

Inputs close to a kink fall on its other side. The GPT came to 8e-4 over segments of 8 steps with AdamW; a changed label
in a batch of 64 is ten times as far or more."""


_MIXED = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
"""What parts of a training with mixed precision were computed in. Replays do not round so coarsely."""


_TEN_BITS = 2.0**-10
"""Unit in the last place of products that GPUs round (TF32)."""


_REASONS = (
    "The data or the module changed, or training_step depends on something that is not recorded; or the data set is "
    'random, for which there is TrajectoryRecorder(batches="store").'
)


@dataclass(frozen=True)
class Drift:
    """How far the replay of a run was from its record, at the worst.

    Args:
        parameters: Distance between rebuilt and recorded parameters at the end of a segment, over the norm of the
            latter; both multiplied by what the optimizer divides gradients by, where it does. Under Adam, say, rounding
            alone moves a parameter whose gradient is close to zero, and so its difference counts little.
        gradients: Largest distance between a recomputed and the recorded gradient, over the latter's norm; ``None``
            where no gradients were recorded.
    """

    parameters: float
    gradients: float | None


@dataclass(frozen=True)
class Recorded:
    """What was recorded of a stretch of steps of R runs, to compare a replay with.

    Args:
        first: The first step.
        last: The step after the last.
        start: Parameters that the replay started from ``(runs, P)``.
        end: Those that the training came to.
        preconditioner: What the optimizer multiplied gradients by at the end ``(runs, P)``; ``None`` for one.
    """

    first: int
    last: int
    start: Tensor
    end: Tensor
    preconditioner: Tensor | None = None

    def distances(self, rebuilt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return norms ``(runs,)``: of the difference at the end, the distance travelled, and the parameters."""
        found = [rebuilt - self.end, self.end - self.start, self.end]
        if self.preconditioner is not None:
            # in units of the gradient; those of the largest one
            scale = self.preconditioner.reciprocal()
            scale = scale / scale.amax(1, keepdim=True).clamp_min(torch.finfo(scale.dtype).tiny)
            found = [part * scale for part in found]
        difference, travelled, size = (part.norm(dim=1) for part in found)
        return difference, travelled, size


class Comparison:
    """Compares what a replay of stacked runs computes with what was recorded, and keeps the largest differences.

    Args:
        names: What errors call each of R runs.
        precision: The Trainer's.
        recorded: Data type of the training's parameters.
        gradients: Data type of the gradients to compare with; ``None`` where there are none.
        tolerance: As for :class:`~lightning_dtda.replay.Replay`.
        dtype: Of the replay.
        device: Of the replay.
        reasons: Why a replay may differ, for errors.
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
    def of_runs(cls, runs: Sequence[Run], tolerance: float, dtype: torch.dtype, device: torch.device) -> Comparison:
        """Compare with the records of R runs."""
        manifest = runs[0].manifest
        gradients = None if manifest.gradients == "none" else getattr(torch, manifest.gradients)
        precision = manifest.configuration["training"]["precision"]
        names = [str(run.path) for run in runs]
        tolerance += runs[0].update.update.rounding
        return cls(names, precision, manifest.torch_dtype, gradients, tolerance, dtype, device)

    @property
    def drift(self) -> tuple[Drift, ...]:
        """How far each run's replay was from its record so far."""
        gradients = self._gradient_drift.tolist() if self._records_gradients else [None] * len(self._names)
        return tuple(map(Drift, self._parameter_drift.tolist(), gradients))

    def reproduced(self, recorded: Recorded, rebuilt: Tensor) -> Tensor:
        """Whether the parameters that a replay came to ``(runs, P)`` are off by rounding only ``(runs,)``."""
        difference, travelled, size = recorded.distances(rebuilt)
        rounding = _ROUNDING_STEPS * (recorded.last - recorded.first) ** 0.5 * torch.finfo(self._recorded_dtype).eps
        # false for a NaN too
        return difference <= self._of_parameters * travelled + rounding * size

    def parameters(self, recorded: Recorded, rebuilt: Tensor) -> None:
        """Compare the parameters that a replay came to ``(runs, P)`` with those of the training.

        Raises:
            ReplayError: If they differ by more than rounding, naming the run.
        """
        difference, travelled, size = recorded.distances(rebuilt)
        relative = difference / size.clamp_min(torch.finfo(self._recorded_dtype).eps)
        torch.maximum(self._parameter_drift, relative, out=self._parameter_drift)
        within = self.reproduced(recorded, rebuilt)
        if not bool(within.all()):
            number = int((~within).nonzero()[0])
            raise ReplayError(
                f"{self._names[number]} is not reproduced between step {recorded.first} and step {recorded.last}: "
                f"parameters differ by {difference[number]:.2g} after travelling {travelled[number]:.2g} (tolerance "
                f"{self._of_parameters:g} of that). {self._reasons}"
            )

    def gradient(
        self, step: int, computed: Tensor, expected: Tensor, again: Callable[[], Tensor] | None = None
    ) -> None:
        """Compare the gradient of a step ``(runs, P)`` with what it should be.

        Args:
            step: t.
            computed: The gradient, by kernels that can be differentiated twice.
            expected: What it should be.
            again: Computes it by the kernels of the training. Others round otherwise, which may put an input on the
                other side of a kink (of a ReLU, say), from where on the two differ by more than rounding.

        Raises:
            ReplayError: If they differ by more than rounding, naming the run.
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
        """Return the relative differences ``(runs,)``, and whether all of them are rounding."""
        difference, size = (computed - expected).norm(dim=1), expected.norm(dim=1)
        # where a gradient vanishes, what rounding leaves of it has no direction to compare
        floor = torch.finfo(self._recorded_dtype).eps
        within = bool((difference <= (self._tolerance + self._stored_eps) * size + floor).all())
        return difference / size.clamp_min(floor), within
