"""The records of several runs, stacked along a first dimension over runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_dtda.errors import ReplayError
from lightning_dtda.optimizers import Hyperparameters, State
from lightning_dtda.replay.examples import Examples
from lightning_dtda.trajectory import Run


@dataclass(frozen=True)
class Records:
    """The records of R runs of equal shape, read when a replay needs them.

    Args:
        runs: The runs.
        dtype: Data type to which floating-point tensors are converted.
        device: Device to which tensors are moved.
    """

    runs: tuple[Run, ...]
    dtype: torch.dtype
    device: torch.device

    def checkpoint(self, step: int) -> tuple[Tensor, list[State]]:
        """Read parameters ``(runs, P)`` and each group's optimizer state at a recorded checkpoint."""
        checkpoints = [run.checkpoint(step) for run in self.runs]
        theta = self._stack([checkpoint.theta for checkpoint in checkpoints])
        states = [
            {key: self._stack([checkpoint.states[group][key] for checkpoint in checkpoints]) for key in state}
            for group, state in enumerate(checkpoints[0].states)
        ]
        return theta, states

    def buffers(self, step: int) -> dict[str, Tensor]:
        """Read buffers and frozen parameters at a recorded checkpoint, each ``(runs, ...)``."""
        initial = [run.checkpoint(0).buffers for run in self.runs]
        current = [run.checkpoint(step).buffers for run in self.runs]
        merged = [first | later for first, later in zip(initial, current, strict=True)]
        # frozen parts may have another data type than the trained parameters; the training computed with that one
        cast = self.dtype != self.runs[0].manifest.torch_dtype
        return {name: self._stack([buffers[name] for buffers in merged], cast) for name in merged[0]}

    def average(self) -> tuple[Tensor, dict[str, Tensor]] | None:
        """Read the average that the runs ended with: parameters ``(runs, P)`` and buffers; ``None`` without one."""
        found = [run.average() for run in self.runs]
        if found[0] is None:
            return None
        averages = [one for one in found if one is not None]
        theta = self._stack([one.theta for one in averages])
        if self.runs[0].manifest.average["buffers"] == "last":  # type: ignore[index]
            return theta, self.buffers(self.runs[0].steps)
        cast = self.dtype != self.runs[0].manifest.torch_dtype
        of_buffers = {name: self._stack([one.buffers[name] for one in averages], cast) for name in averages[0].buffers}
        return theta, self.buffers(self.runs[0].steps) | of_buffers

    @property
    def averaged_steps(self) -> dict[int, float]:
        """Coefficients of the average that the runs ended with, by step; empty if there is no average."""
        return self.runs[0].averaged_steps

    def averages_statistics(self, step: int) -> float:
        """Return the coefficient of a step's running statistics in the final result of the training."""
        average = self.runs[0].manifest.average
        if average is None or average["buffers"] == "last":
            return float(step == self.runs[0].steps)
        if average["buffers"] == "updated":  # the statistics of the last update
            return float(step == average["steps"][-1])
        return self.averaged_steps.get(step, 0.0)

    def gradient(self, step: int) -> Tensor:
        """Read the gradient that was applied in a step ``(runs, P)``."""
        return self._stack([run.gradient_vector(step) for run in self.runs])

    def gradient_norms(self, step: int) -> Tensor:
        """Read the norm of a step's gradient before clipping ``(runs,)``."""
        return self._stack([run.gradient_norm(step) for run in self.runs])

    def hyperparameters(self, step: int, ndim: int = 2) -> list[Hyperparameters]:
        """Return each group's hyperparameters: numbers if the runs agree, else tensors with ``ndim`` dimensions.

        The first dimension is over runs, the others broadcast: use 2 for parameters ``(runs, P)``, and 3 for cotangents
        ``(runs, queries, P)``.
        """
        of_groups = zip(*(run.hyperparameters(step) for run in self.runs), strict=True)
        return [self._merge(of_runs, ndim) for of_runs in of_groups]

    def _merge(self, of_runs: Sequence[Hyperparameters], ndim: int) -> Hyperparameters:
        merged: dict[str, Any] = {}
        for key, value in of_runs[0].items():
            values = [hyperparameters[key] for hyperparameters in of_runs]
            merged[key] = (
                value
                if all(other == value for other in values)
                else torch.tensor(values, dtype=self.dtype, device=self.device).reshape(-1, *[1] * (ndim - 1))
            )
        return merged

    def _stack(self, tensors: list[Tensor], cast: bool = True) -> Tensor:
        stacked = torch.stack(tensors)
        return stacked.to(self.device, self.dtype if cast and stacked.is_floating_point() else stacked.dtype)


def check_fit(runs: Sequence[Run], examples: Examples) -> None:
    """Check that runs can be stacked, and that they were trained on the given examples.

    Raises:
        ReplayError: If they cannot be stacked, or were trained on other examples.
    """
    if len({shape_key(run) for run in runs}) != 1:
        raise ReplayError("Only runs with the same number of steps, checkpoints and recording settings can be stacked.")
    examples.refuse_changes(runs[0])


def shape_key(run: Run) -> tuple[Any, ...]:
    """Return a key that runs must share to be stacked."""
    averaged = tuple(run.averaged_steps.items())
    return run.steps, tuple(run.checkpoint_steps), run.manifest.gradients, run.manifest.batches, averaged
