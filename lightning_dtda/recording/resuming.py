"""Continuing the record of a training that resumes from a Trainer's checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_dtda.errors import RecordingError, TrajectoryError
from lightning_dtda.trajectory import Manifest, Run, is_being_written
from lightning_dtda.trajectory.manifest import mismatch

_SAME = 1e-4
"""Relative distance up to which parameters are considered the recorded ones. A trajectory that is rebuilt on another
device than the training differs by rounding; that of another training differs by something of order one."""

_FREE = {"hyperparameters": None, "training": ("max_epochs", "max_steps")}
"""Parts of a configuration that may change: the length of the training, and the initial hyperparameters (recorded)."""


def resume(directory: Path, new: Manifest, steps: int, theta: Tensor, gradients_given: bool) -> Manifest:
    """Return the manifest of a run that resumes after a number of steps; later steps are discarded.

    Args:
        directory: Directory of the run.
        new: Manifest that the run would have if it started now.
        steps: Number of steps of the run when the Trainer's checkpoint was saved.
        theta: Parameters that the Trainer restored ``(P,)``.
        gradients_given: Whether the precision of the gradients was set by the user, not chosen by the recorder.

    Raises:
        RecordingError: If the record is missing or belongs to another training.
    """
    remedy = "Train from the start (no ckpt_path), or use the root that the checkpoint's run was recorded in."
    if is_being_written(directory):
        raise RecordingError(f"{directory} is being recorded by another process. Wait for it.")
    try:
        run = Run(directory)
        if run.steps < steps:
            raise TrajectoryError(f"{directory} holds only {run.steps} steps.")
        recorded = run.theta_vector(steps) if run.has_theta(steps) else None
    except TrajectoryError as error:
        raise RecordingError(
            f"The training resumes after {steps} recorded steps, but their record cannot be read: {error} {remedy}"
        ) from error
    old = run.manifest
    if found := mismatch(_fixed(old.comparable), _fixed(new.comparable)):
        raise RecordingError(
            f"The training resumes with a configuration that differs from that of {directory}:\n{found}\nResume "
            "with the same configuration; only the length of the training may change."
        )
    if (gradients_given and new.gradients != old.gradients) or new.batches != old.batches:
        raise RecordingError(
            f"{directory} was recorded with gradients={old.gradients!r} and batches={old.batches!r}, but resumes "
            f"with gradients={new.gradients!r} and batches={new.batches!r}. Use the same settings throughout."
        )
    if recorded is not None and (recorded - theta.cpu()).norm() > _SAME * recorded.norm():
        raise RecordingError(f"The checkpoint's parameters are not those of {directory} after {steps} steps. {remedy}")
    old.cut(steps)
    old.configuration["training"] = new.configuration["training"]
    old.planned_steps, old.status, old.reason = new.planned_steps, "recording", None
    return old


def _fixed(configuration: dict[str, Any]) -> dict[str, Any]:
    return {
        part: {name: value for name, value in content.items() if name not in (_FREE[part] or content)}
        if part in _FREE
        else content
        for part, content in configuration.items()
    }
