"""A training that goes on from a Trainer's checkpoint, and its record with it: one trajectory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_dtda.errors import RecordingError, TrajectoryError
from lightning_dtda.trajectory import Manifest, Run, is_being_written
from lightning_dtda.trajectory.manifest import differences

_SAME = 1e-4
"""Relative distance up to which parameters are taken for those of the record: a trajectory that is rebuilt on another
device than it was trained on differs by rounding, another training's by something of order one."""

_FREE = {"hyperparameters": None, "training": ("max_epochs", "max_steps")}
"""Parts of a configuration that may change: how long to train, and the rates at the first step, which are recorded."""


def resume(directory: Path, new: Manifest, steps: int, theta: Tensor, gradients_given: bool) -> Manifest:
    """Return the manifest of a run that goes on after a number of steps, what was recorded beyond them forgotten.

    Args:
        directory: The run's.
        new: What the manifest would be if the run began now.
        steps: How many steps it had when the Trainer's checkpoint was saved.
        theta: The parameters that the Trainer restored ``(P,)``.
        gradients_given: Whether the gradients' precision was asked for, and not chosen by the recorder.

    Raises:
        RecordingError: If the record is not there, or is of another training.
    """
    remedy = "Train from the start (no ckpt_path), or give the checkpoint's own root and run."
    if is_being_written(directory):
        raise RecordingError(f"{directory} is being recorded by another process. Wait for it.")
    try:
        run = Run(directory)
        if run.steps < steps:
            raise TrajectoryError(f"{directory} holds {run.steps} steps only.")
        recorded = run.theta_vector(steps) if run.has_theta(steps) else None
    except TrajectoryError as error:
        raise RecordingError(
            f"The training resumes after {steps} recorded steps, of which there is no record ({error}) {remedy}"
        ) from error
    old = run.manifest
    if found := differences(_fixed(old.comparable), _fixed(new.comparable)):
        raise RecordingError(
            f"The training resumes with another configuration than {directory} was recorded with:\n{found}\nResume "
            "with the same one; only the length of the training may change."
        )
    if (gradients_given and new.gradients != old.gradients) or new.batches != old.batches:
        raise RecordingError(
            f"{directory} was recorded with gradients={old.gradients!r} and batches={old.batches!r}, and is to go on "
            f"with {new.gradients!r} and {new.batches!r}. Record it in one way throughout."
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
