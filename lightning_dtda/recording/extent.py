"""How much of a training is recorded, and what disk and memory that takes: settled before the first step."""

from __future__ import annotations

import logging
import math
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from lightning_dtda.errors import RecordingError
from lightning_dtda.recording import checks
from lightning_dtda.recording.shard_buffer import SHARD_BYTES, shard_steps
from lightning_dtda.replay.replica import buffers
from lightning_dtda.trajectory import Manifest, ParameterLayout
from lightning_dtda.trajectory.writer import FILES_IN_MEMORY
from lightning_dtda.units import GIB, human_bytes

_log = logging.getLogger(__name__)

_UNKNOWN_LENGTH_INTERVAL = 100
"""Steps between checkpoints under "sqrt" where the number of steps is not known beforehand: that of 10,000 steps."""


def planned_steps(trainer: pl.Trainer) -> int | None:
    """Return the number of steps that the Trainer means to take, ``None`` where it cannot know."""
    steps = trainer.estimated_stepping_batches
    return None if math.isinf(steps) or steps < 0 else int(steps)


def gradient_precision(asked: str, budget: float, layout: ParameterLayout, planned: int | None) -> str:
    """Return the data type in which gradients are stored, or ``none``.

    Args:
        asked: As the recorder was asked; ``auto`` chooses.
        budget: In GiB, for ``auto``.
        layout: The recorded parameters.
        planned: Number of steps.
    """
    if asked != "auto":
        return asked
    needed = math.inf if planned is None else planned * layout.size * torch.float32.itemsize / GIB
    if needed <= budget:
        return "float32"
    size = "unknown in advance" if planned is None else human_bytes(needed * GIB)
    message = "Gradients are not recorded: their size is %s, the budget %.1f GiB. A replay computes them anew."
    _log.info(message, size, budget)
    return "none"


def checkpoint_interval(asked: str | int, planned: int | None) -> int:
    """Return the number of steps between checkpoints, for what the recorder was asked."""
    if asked == "all":
        return 1
    if asked == "sqrt":
        return _UNKNOWN_LENGTH_INTERVAL if planned is None else max(1, math.ceil(math.sqrt(planned)))
    return int(asked)


class Needed(NamedTuple):
    """What a recording takes, in bytes.

    Args:
        disk: Of the run; infinite where the number of steps is not known.
        memory: At most, for what was recorded and is not yet on disk.
    """

    disk: float
    memory: int


def needed(
    trainer: pl.Trainer, module: pl.LightningModule, optimizer: Optimizer, manifest: Manifest, interval: int, batch: Any
) -> Needed:
    """Return the disk and the memory that the recording of a run will take."""
    layout = manifest.layout
    per_checkpoint = sum(buffer.nbytes for buffer in buffers(module, layout, step=0).values())
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
    disk = math.inf if steps is None else steps * per_step + (steps // interval + 2) * per_checkpoint
    return Needed(disk, FILES_IN_MEMORY * max(per_shard, per_checkpoint))


def check_disk(what: str, root: Path, disk: float, memory: int) -> None:
    """Say how much disk and memory a recording takes.

    Args:
        what: Is recorded.
        root: Where.
        disk: Bytes.
        memory: Bytes.

    Raises:
        RecordingError: If so much disk is not free.
    """
    beside = f"at most {human_bytes(memory)} of memory beside the training's"
    if math.isinf(disk):
        _log.info("Recording %s needs %s. The number of steps is unknown, and with it the disk.", what, beside)
        return
    existing = next(path for path in [root, *root.resolve().parents] if path.exists())
    free = shutil.disk_usage(existing).free
    _log.info("Recording %s needs about %s of disk, and %s.", what, human_bytes(disk), beside)
    if disk > free:
        raise RecordingError(
            f"Recording {what} needs about {human_bytes(disk)} of disk; {human_bytes(free)} are free. Free some, "
            'choose another root, record less (gradients="none", batches="indices"), or set a larger checkpoint_every.'
        )
