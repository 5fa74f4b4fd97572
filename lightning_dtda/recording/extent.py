"""How much of a training is recorded, and the disk space and memory it needs; decided before the first step."""

from __future__ import annotations

import logging
import math
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch.optim import Optimizer

from lightning_dtda.compatibility import tree_leaves
from lightning_dtda.errors import DiskSpaceError
from lightning_dtda.recording import checks
from lightning_dtda.recording.shard_buffer import SHARD_BYTES, shard_steps
from lightning_dtda.replay.replica import buffers
from lightning_dtda.trajectory import Manifest, ParameterLayout
from lightning_dtda.trajectory.writer import FILES_IN_MEMORY
from lightning_dtda.units import GIB, human_bytes

_log = logging.getLogger(__name__)

_UNKNOWN_LENGTH_INTERVAL = 100
"""Steps between checkpoints for "sqrt" if the number of steps is not known in advance: as for 10,000 steps."""


def planned_steps(trainer: pl.Trainer) -> int | None:
    """Return the number of steps that the Trainer is going to take, or ``None`` if it cannot be known."""
    steps = trainer.estimated_stepping_batches
    return None if math.isinf(steps) or steps < 0 else int(steps)


def gradient_precision(asked: str, budget: float, layout: ParameterLayout, planned: int | None) -> str:
    """Return the data type in which gradients are stored, or ``none``.

    Args:
        asked: Argument ``gradients`` of the recorder.
        budget: Budget for ``auto`` in GiB.
        layout: Layout of the recorded parameters.
        planned: Number of steps; ``None`` if it is unknown.
    """
    if asked != "auto":
        return asked
    needed = math.inf if planned is None else planned * layout.size * torch.float32.itemsize / GIB
    if needed <= budget:
        return "float32"
    size = "unknown in advance" if planned is None else human_bytes(needed * GIB)
    message = "Gradients are not recorded: their size is %s, the budget is %.1f GiB. A replay recomputes them."
    _log.info(message, size, budget)
    return "none"


def checkpoint_interval(asked: str | int, planned: int | None) -> int:
    """Return the number of steps between checkpoints for the recorder's argument ``checkpoint_every``."""
    if asked == "all":
        return 1
    if asked == "sqrt":
        return _UNKNOWN_LENGTH_INTERVAL if planned is None else max(1, math.ceil(math.sqrt(planned)))
    return int(asked)


class Needed(NamedTuple):
    """Disk space and memory that a recording needs, in bytes.

    Args:
        disk: Disk space of the run; infinite if the number of steps is unknown.
        memory: Maximum memory for records that are not on disk yet.
    """

    disk: float
    memory: int


def needed(
    trainer: pl.Trainer, module: pl.LightningModule, optimizer: Optimizer, manifest: Manifest, interval: int, batch: Any
) -> Needed:
    """Return the disk space and the memory that recording a run will need."""
    layout = manifest.layout
    at_start, later = (sum(buffer.nbytes for buffer in buffers(module, layout, step).values()) for step in (0, 1))
    frozen = at_start - later  # only in the first checkpoint
    per_checkpoint = later
    states = sum(
        sum(sizes.values()) for sizes in checks.state_sizes(optimizer, map(module.get_parameter, layout.names))
    )
    per_checkpoint += (layout.size + states) * manifest.torch_dtype.itemsize
    per_step, per_shard = 0, 0
    if manifest.gradients != "none":
        dtype = getattr(torch, manifest.gradients)
        per_step = layout.size * dtype.itemsize
        per_shard = per_step * min(interval, shard_steps(layout, dtype))
    if manifest.batches == "store":
        of_batch = sum(leaf.nbytes for leaf in tree_leaves(batch))
        per_step += trainer.world_size * trainer.accumulate_grad_batches * of_batch
        per_shard += min(SHARD_BYTES, interval * trainer.accumulate_grad_batches * of_batch)
    steps = manifest.planned_steps
    disk = math.inf if steps is None else steps * per_step + (steps // interval + 2) * per_checkpoint + frozen
    return Needed(disk, FILES_IN_MEMORY * max(per_shard, per_checkpoint) + frozen)


def check_disk(what: str, root: Path, disk: float, memory: int) -> None:
    """Log how much disk space and memory a recording needs, and check that the disk space is free.

    Args:
        what: Name of what is recorded.
        root: Directory to record into.
        disk: Disk space in bytes.
        memory: Memory in bytes.

    Raises:
        DiskSpaceError: If there is not enough free disk space.
    """
    beside = f"at most {human_bytes(memory)} of memory in addition to the training"
    if math.isinf(disk):
        _log.info("Recording %s needs %s. Its disk space is unknown, like the number of steps.", what, beside)
        return
    existing = next(path for path in [root, *root.resolve().parents] if path.exists())
    free = shutil.disk_usage(existing).free
    _log.info("Recording %s needs about %s of disk space and %s.", what, human_bytes(disk), beside)
    if disk > free:
        raise DiskSpaceError(
            f"Recording {what} needs about {human_bytes(disk)} of disk space; {human_bytes(free)} are free. Free some, "
            'choose another root, record less (gradients="none", batches="indices"), or set a larger checkpoint_every.'
        )
