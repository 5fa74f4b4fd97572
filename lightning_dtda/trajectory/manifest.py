"""The description of a run: ``manifest.json``, the single source of truth about what is complete."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import torch
from typing_extensions import NotRequired, TypedDict

from lightning_dtda.errors import TrajectoryError, UnknownFormatError
from lightning_dtda.trajectory.layout import ParameterLayout
from lightning_dtda.trajectory.schema import Count, FileEntry, conform
from lightning_dtda.trajectory.storage import read_json, write_json

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
EXAMPLES = "examples.safetensors"
AVERAGE = "average.safetensors"

_ADDED = frozenset({"seeds"})
"""Fields that older files of this version lack."""

Status = Literal["recording", "complete", "incomplete"]
Float = Literal["float64", "float32", "float16", "bfloat16"]
Sharing = Literal["none", "network", "loss"]
Source = Literal["initialisation", "order", "noise"]


class Dataset(TypedDict):
    """The part of the configuration that says what was trained on; it may have more entries."""

    length: Count
    fingerprint: Any


class Training(TypedDict):
    """The part of the configuration that says how the Trainer was set up; it has more entries."""

    gradient_clip_val: float | None
    gradient_clip_algorithm: Literal["norm", "value"] | None
    precision: str


class Configuration(TypedDict):
    """Settings that all runs of an ensemble share."""

    module: dict[str, Any]
    dataset: Dataset
    training: Training
    hyperparameters: dict[str, list[float]]


class Parameter(TypedDict):
    """Name and shape of a trained parameter."""

    name: str
    shape: Annotated[list[Count], msgspec.Meta(max_length=64)]


class Circumstance(TypedDict):
    """Other inputs that ``training_step`` may have depended on."""

    trainer: dict[str, int | float | str | bool | None]
    updated_buffers: list[str]
    transfer_hooks: dict[str, str]
    kernels: NotRequired[list[str] | None]


class Shared(TypedDict):
    """What the examples of a batch share."""

    training: Sharing
    evaluation: Sharing
    reduction: Literal["mean", "sum", "other"]


class Shard(FileEntry):
    """A file of per-step records."""

    first_step: Count
    last_step: Count


class CheckpointFile(FileEntry):
    """A file of parameters and optimizer state."""

    step: Count


class AverageFile(FileEntry):
    """A file of averaged parameters."""

    steps: list[Count]
    coefficients: list[float]
    buffers: Literal["last", "updated", "averaged"]


@dataclass
class Manifest:
    """Everything about a run that is not a tensor.

    Args:
        seed: Argument of ``seed_everything``, if it was called; with ``seeds``, the number that combines them.
        configuration: Settings that all runs of an ensemble share: module class and hyperparameters, optimizer, data
            set, trainer settings. Runs that differ here are not samples of one distribution.
        parameters: Name and shape of every trained parameter, in the order of the flat vector.
        group_lengths: Number of parameters (tensors) in each of the optimizer's groups.
        dtype: Data type of the parameters, e.g. ``float32``.
        optimizer: Import path of the optimizer's class.
        options: Non-numeric settings of each parameter group (``nesterov``, ``maximize``).
        hyperparameters: Names of the numbers recorded at every step for every group.
        gradients: Data type in which gradients are stored, or ``none``.
        batches: ``store`` if the batches themselves are stored, else ``indices``.
        processes: Number of processes of the training. This is the manifest of the first process; those of the others
            are in sub-directories.
        evaluation_modules: Submodules that were in evaluation mode during training.
        circumstances: Other inputs that ``training_step`` may have depended on: attributes of the Trainer, buffers that
            a step changes, and the hooks that its batches passed through.
        shared: What the examples of a batch share, in ``training`` and in ``evaluation`` mode: ``network``, ``loss`` or
            ``none``; and the kind of the loss's ``reduction`` over them: ``mean``, ``sum`` or ``other``.
        threads: ``torch.get_num_threads()``; replay is bitwise identical only with the same number.
        versions: Versions of torch, lightning and lightning-dtda.
        planned_steps: Number of steps the Trainer was going to take; ``None`` if it is unknown.
        status: ``recording`` until the training ends; a run with this status is still running or was killed.
        reason: Why the run is incomplete.
        metrics: What the training logged with ``self.log``, at its end: finite numbers by name.
        steps: Number of optimizer steps whose record is on disk.
        shards: Files of per-step records, each with its first and last step.
        checkpoints: Files of parameters and optimizer state, each with its step.
        average: File of the averaged parameters that the training ended with instead of its last ones, with the
            ``steps`` and ``coefficients`` of the average; ``None`` if it ended with the last ones.
        examples: File of the training examples' checksums; ``None`` if batches are stored.
        seeds: Seed of each source of randomness that the ensemble crosses: ``initialisation``, ``order``, ``noise``;
            ``None`` if the run has a single seed.
    """

    seed: Count | None
    configuration: Configuration
    parameters: list[Parameter]
    group_lengths: list[Count]
    dtype: Float
    optimizer: str
    options: list[dict[str, Any]]
    hyperparameters: list[str]
    gradients: Float | Literal["none"]
    batches: Literal["store", "indices"]
    processes: Count
    evaluation_modules: list[str]
    circumstances: Circumstance
    shared: Shared
    threads: Count
    versions: dict[str, str]
    planned_steps: Count | None
    status: Status = "recording"
    reason: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    steps: Count = 0
    shards: list[Shard] = field(default_factory=list)
    checkpoints: list[CheckpointFile] = field(default_factory=list)
    examples: FileEntry | None = None
    average: AverageFile | None = None
    seeds: dict[Source, Count] | None = None
    format_version: int = FORMAT_VERSION

    @property
    def layout(self) -> ParameterLayout:
        """Position of each parameter in the flat vector."""
        return ParameterLayout(
            tuple(entry["name"] for entry in self.parameters),
            tuple(tuple(entry["shape"]) for entry in self.parameters),
            tuple(self.group_lengths),
        )

    @property
    def torch_dtype(self) -> torch.dtype:
        """Data type of the parameters."""
        return getattr(torch, self.dtype)

    @property
    def files(self) -> list[FileEntry]:
        """All files listed in the manifest."""
        return [*self.shards, *self.checkpoints, *(one for one in (self.examples, self.average) if one is not None)]

    @property
    def comparable(self) -> dict[str, Any]:
        """Settings that runs must share to be samples of one distribution."""
        return {
            **self.configuration,
            "parameters": {entry["name"]: entry["shape"] for entry in self.parameters},
            "dtype": self.dtype,
            "processes": self.processes,
            "optimizer": self.optimizer,
            "options": self.options,
            "evaluation_modules": self.evaluation_modules,
        }

    def cut(self, steps: int) -> None:
        """Drop everything after a number of steps; the last shard's file may hold more steps than are listed."""
        self.steps = min(self.steps, steps)
        self.checkpoints = [entry for entry in self.checkpoints if entry["step"] <= steps]
        self.shards = [
            entry | {"last_step": min(entry["last_step"], steps)}
            for entry in self.shards
            if entry["first_step"] < steps
        ]

    def save(self, directory: Path) -> None:
        """Write ``manifest.json`` to a run directory."""
        # not asdict, which would copy every entry of every file
        write_json(directory / MANIFEST, {item.name: getattr(self, item.name) for item in fields(self)})

    @classmethod
    def load(cls, directory: Path) -> Manifest:
        """Read the manifest of a run directory.

        Raises:
            TrajectoryError: If there is none, or its format is unknown to this version.
        """
        path = directory / MANIFEST
        content = read_json(path)
        version = content.get("format_version")
        if version != FORMAT_VERSION:
            raise UnknownFormatError(
                f"{path} has format version {version!r}; this lightning-dtda reads version {FORMAT_VERSION}. "
                "Install the version that wrote it, or record the run again."
            )
        conform(content, cls, path)
        known = {item.name for item in fields(cls)}
        if missing := sorted(known - content.keys() - _ADDED):  # those with a default are not missed above
            raise TrajectoryError(f"{path} is missing {', '.join(missing)}. Record the run again.")
        manifest = cls(**{name: content[name] for name in known & content.keys()})
        if reason := manifest._contradiction():
            raise TrajectoryError(f"{path} is damaged: {reason}. Record the run again.")
        return manifest

    def _contradiction(self) -> str | None:
        """Return which fields contradict each other, if any do."""
        names, steps = [entry["name"] for entry in self.parameters], [entry["step"] for entry in self.checkpoints]
        starts = [entry["first_step"] for entry in self.shards]
        ends = [entry["last_step"] for entry in self.shards]
        # an axis of length 0 counts as well, since torch multiplies the others
        size = sum(math.prod(max(1, length) for length in entry["shape"]) for entry in self.parameters)
        size *= self.torch_dtype.itemsize
        average = self.average
        contradictions = {
            "parameters are listed twice": len(set(names)) < len(names),
            "groups and parameters differ in number": sum(self.group_lengths) != len(names),
            "options and groups differ in number": len(self.options) != len(self.group_lengths),
            "hyperparameters are listed twice": len(set(self.hyperparameters)) < len(self.hyperparameters),
            "settings and groups differ in number": any(
                len(values) != len(self.options) for values in self.configuration["hyperparameters"].values()
            ),
            "there is no learning rate": "lr" not in self.hyperparameters,
            "it lists no process": self.processes < 1,
            "the shards do not follow each other": [*starts, self.steps] != [0, *ends] or starts != sorted(set(starts)),
            "the checkpoints are not in order": steps != sorted(set(steps))
            or (steps != [] and (steps[0] > 0 or steps[-1] > self.steps)),
            "the parameters are larger than a checkpoint": size >= 2**63
            or any(entry["bytes"] < size for entry in self.checkpoints),
            "the average's steps and coefficients differ in number": average is not None
            and len(average["steps"]) != len(average["coefficients"]),
            "the average has steps that were not taken": average is not None
            and (not average["steps"] or max(average["steps"]) > self.steps),
        }
        return next((text for text, found in contradictions.items() if found), None)


def changed_leaves(first: Any, second: Any, absent: Any = None, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield the path and the two values of each leaf in which two JSON values differ.

    Args:
        first: First value.
        second: Second value.
        absent: Placeholder for leaves that only the other value has.
        where: Path of the two values themselves.
    """
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        for key in dict.fromkeys([*first, *second]):
            below = f"{where}.{key}" if where else str(key)
            yield from changed_leaves(first.get(key, absent), second.get(key, absent), absent, below)
    elif first != second:
        yield where, first, second


def mismatch(first: Any, second: Any) -> str:
    """List the leaves in which two JSON values differ, one per line."""
    found = changed_leaves(first, second, absent="absent")
    return "\n".join(f"  {where}: {one!r} vs. {other!r}" for where, one, other in found)
