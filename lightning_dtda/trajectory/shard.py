"""The records of consecutive steps, in one file of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_dtda.errors import TrajectoryError
from lightning_dtda.trajectory.manifest import Manifest
from lightning_dtda.trajectory.schema import FLOATS, INT64, Expected, check_tensors
from lightning_dtda.trajectory.storage import read_tensors

LEAF = "leaves."
"""Prefix of a shard's entries for stored batches, one entry per tensor in a batch."""

RNG_STATES, RNG_SIZES, RNG_MICRO_BATCHES = "rng_states.", "rng_sizes.", "rng_micro_batches."
"""Prefixes of a shard's entries for each random number generator: its concatenated states, the number of bytes of each
state, and the micro-batch that follows each state."""

_RECORDS: dict[str, Expected] = {
    "micro_batches": (INT64, ("steps",)),
    "accumulate_grad_batches": (INT64, ("steps",)),
    "hyperparameters": ((torch.float64,), ("steps", "groups", "settings")),
    "micro_batch_sizes": (INT64, ("micro-batches",)),
    "epochs": (INT64, ("micro-batches",)),
    "batch_idx": (INT64, ("micro-batches",)),
    "global_steps": (INT64, ("micro-batches",)),
    "indices": (INT64, ("examples",)),
}
"""Entries that every shard has."""


@dataclass(frozen=True)
class MicroBatch:
    """One forward and backward pass of a step.

    Args:
        indices: Data set indices in order ``(B,)``.
        epoch: ``trainer.current_epoch``.
        batch_idx: ``batch_idx`` as passed to ``training_step``.
        rng_states: States of the random number generators that the pass drew from, by name (torch's are ``cpu`` and
            ``cuda``), taken before the batch was moved to the module.
        leaves: Tensors of the batch, each ``(B, ...)``; empty if batches were not stored.
        process: Process that ran the pass; 0 if there was only one.
        global_step: ``trainer.global_step``, which also counts steps that were not taken.
    """

    indices: Tensor
    epoch: int
    batch_idx: int
    rng_states: dict[str, Tensor]
    leaves: tuple[Tensor, ...] = ()
    process: int = 0
    global_step: int = 0


class Shard:
    """The records of consecutive steps; ragged data are concatenated and stored together with their lengths.

    Args:
        directory: Directory of the run.
        manifest: Manifest of the run.
        number: Number of the shard.

    Raises:
        TrajectoryError: If the file is damaged, or its records contradict each other or the manifest.
    """

    def __init__(self, directory: Path, manifest: Manifest, number: int) -> None:
        entry = manifest.shards[number]
        where = directory / entry["file"]
        self.tensors = tensors = read_tensors(directory, entry)
        names = [key.removeprefix(RNG_STATES) for key in tensors if key.startswith(RNG_STATES)]
        leaves = sorted((key for key in tensors if key.startswith(LEAF)), key=lambda key: (len(key), key))
        _check(tensors, manifest, number, names, leaves, where)
        sizes = tensors["micro_batch_sizes"].tolist()
        self._indices = torch.split(tensors["indices"], sizes)
        self._leaves = list(zip(*(torch.split(tensors[key], sizes) for key in leaves), strict=True))
        self._first_micro_batch = [0, *tensors["micro_batches"].cumsum(0).tolist()]
        self._rng: dict[int, dict[str, Tensor]] = {}
        for name in names:
            states = torch.split(tensors[f"{RNG_STATES}{name}"], tensors[f"{RNG_SIZES}{name}"].tolist())
            for micro_batch, state in zip(tensors[f"{RNG_MICRO_BATCHES}{name}"].tolist(), states, strict=True):
                # a copy: torch.set_rng_state crashes on a view into a larger tensor
                self._rng.setdefault(micro_batch, {})[name] = state.clone()

    def micro_batches(self, row: int) -> list[MicroBatch]:
        """Return the micro-batches of a step, by its row in the shard."""
        tensors: dict[str, Any] = self.tensors
        return [
            MicroBatch(
                indices=self._indices[m],
                epoch=int(tensors["epochs"][m]),
                batch_idx=int(tensors["batch_idx"][m]),
                global_step=int(tensors["global_steps"][m]),
                rng_states=self._rng.get(m, {}),
                leaves=self._leaves[m] if self._leaves else (),
            )
            for m in range(self._first_micro_batch[row], self._first_micro_batch[row + 1])
        ]


def _check(
    tensors: dict[str, Tensor], manifest: Manifest, number: int, names: list[str], leaves: list[str], where: Path
) -> None:
    """Refuse records that contradict each other or the manifest."""
    entry, expected = manifest.shards[number], dict(_RECORDS)
    if manifest.gradients != "none":
        expected["gradients"] = ((getattr(torch, manifest.gradients),), ("steps", "parameters"))
    if "gradient_norms" in tensors:
        expected["gradient_norms"] = (FLOATS, ("steps",))
    for name in names:
        expected[f"{RNG_MICRO_BATCHES}{name}"] = expected[f"{RNG_SIZES}{name}"] = (INT64, (f"draws of {name}",))
        expected[f"{RNG_STATES}{name}"] = ((torch.uint8,), (f"bytes of {name}",))
    lengths = {
        "groups": len(manifest.group_lengths),
        "settings": len(manifest.hyperparameters),
        "parameters": manifest.layout.size,
    }
    lengths = check_tensors(tensors, expected, where, lengths)
    examples = manifest.configuration["dataset"]["length"]
    indices, sizes = tensors["indices"], tensors["micro_batch_sizes"]
    drawn = [tensors[f"{RNG_MICRO_BATCHES}{name}"] for name in names]
    contradictions = {
        "it has fewer steps than listed": lengths["steps"] < entry["last_step"] - entry["first_step"],
        "indices": not _within(indices, examples),
        "micro_batch_sizes": not _adds_up(sizes, len(indices)),
        "micro_batches": not _adds_up(tensors["micro_batches"], len(sizes)),
        "accumulate_grad_batches": bool((tensors["accumulate_grad_batches"] < 1).any()),
        "the random states": not all(_within(one, len(sizes)) for one in drawn)
        or not all(_adds_up(tensors[f"{RNG_SIZES}{n}"], len(tensors[f"{RNG_STATES}{n}"])) for n in names),
        "the stored batches": any(tensors[key].shape[:1] != indices.shape for key in leaves)
        or (manifest.batches == "store" and not leaves),
    }
    if found := [what for what, contradicts in contradictions.items() if contradicts]:
        raise TrajectoryError(f"{where} contradicts itself ({', '.join(found)}). Record the run again.")


def _within(values: Tensor, end: int) -> bool:
    """Return whether all of some integers are from 0 to ``end - 1``."""
    return not len(values) or bool(values.min() >= 0 and values.max() < end)


def _adds_up(lengths: Tensor, total: int) -> bool:
    """Return whether some lengths are those of parts of a whole."""
    return _within(lengths, total + 1) and int(lengths.sum()) == total
