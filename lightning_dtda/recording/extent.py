"""How much of a training is recorded, and what disk that takes: settled before the first step."""

from __future__ import annotations

import logging
import math
import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from lightning_dtda.errors import RecordingError
from lightning_dtda.recording import checks
from lightning_dtda.recording.run_recording import buffers
from lightning_dtda.trajectory import Manifest, ParameterLayout
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


def needed_bytes(
    trainer: pl.Trainer, module: pl.LightningModule, optimizer: Optimizer, manifest: Manifest, interval: int, batch: Any
) -> float:
    """Return the disk that a run will take; infinite where the number of steps is not known."""
    if manifest.planned_steps is None:
        return math.inf
    layout = manifest.layout
    per_checkpoint = sum(buffer.nbytes for buffer in buffers(module, layout, step=0).values())
    states = sum(
        sum(sizes.values()) for sizes in checks.state_sizes(optimizer, map(module.get_parameter, layout.names))
    )
    per_checkpoint += (layout.size + states) * manifest.torch_dtype.itemsize
    per_step = 0
    if manifest.gradients != "none":
        per_step = layout.size * getattr(torch, manifest.gradients).itemsize
    if manifest.batches == "store":
        of_batch = sum(leaf.nbytes for leaf in tree_leaves(batch))
        per_step += trainer.world_size * trainer.accumulate_grad_batches * of_batch
    return manifest.planned_steps * per_step + (manifest.planned_steps // interval + 2) * per_checkpoint


def check_disk(what: str, root: Path, needed: float) -> None:
    """Say how much disk a recording takes.

    Args:
        what: Is recorded.
        root: Where.
        needed: Bytes.

    Raises:
        RecordingError: If so much is not free.
    """
    if math.isinf(needed):
        _log.info("The number of steps is unknown, and with it the disk that %s will need.", what)
        return
    existing = next(path for path in [root, *root.resolve().parents] if path.exists())
    free = shutil.disk_usage(existing).free
    _log.info("Recording %s needs about %s of disk.", what, human_bytes(needed))
    if needed > free:
        raise RecordingError(
            f"Recording {what} needs about {human_bytes(needed)} of disk; {human_bytes(free)} are free. Free some, "
            'choose another root, record less (gradients="none", batches="indices"), or set a larger checkpoint_every.'
        )
