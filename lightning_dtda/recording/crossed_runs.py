"""Checks of recorded runs with seeds set apart: runs that share a seed must share what it decides."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from lightning_dtda.errors import RecordingError
from lightning_dtda.recording.crossed_seeds import CrossedSeeds
from lightning_dtda.recording.recorder import run_name
from lightning_dtda.recording.seeds import is_complete
from lightning_dtda.trajectory import Run
from lightning_dtda.trajectory.manifest import Source

_log = logging.getLogger(__name__)


def refuse_other_seeds(root: Path, wanted: Sequence[int], crossed: CrossedSeeds | None) -> None:
    """Refuse complete runs whose names are those of wanted runs, but which were recorded with other seeds.

    Raises:
        RecordingError: If there is one.
    """
    for seed in wanted:
        directory = root / run_name(seed)
        if not is_complete(directory):
            continue
        found, expected = Run(directory).manifest.seeds, None if crossed is None else crossed.of_run(seed).crossed
        if found != expected:
            raise RecordingError(
                f"{directory} was recorded with {_said(found)}, not with {_said(expected)}. Choose another directory "
                "for this ensemble."
            )


def check_crossed(root: Path, seeds: Sequence[int]) -> None:
    """Check that complete runs with the same seed of a source share what this source decides.

    Runs with the same initialisation must start from the same parameters, and runs with the same order must have the
    same batches, at the first, the middle and the last step that both have.

    Raises:
        RecordingError: If they do not, so the variance cannot be split by source.
    """
    directories = [root / run_name(seed) for seed in seeds]
    runs = [Run(directory) for directory in directories if is_complete(directory)]
    runs = [run for run in runs if run.manifest.seeds is not None]
    _compare(runs, "initialisation", _same_start, "start from the same parameters", _INITIALISATION)
    if _compare(runs, "order", _same_batches, "have the same batches", _ORDER) and len(runs) > 1:
        _log.warning(
            "The batches are the same for all seeds of the order, so it contributes nothing to the variance. If the "
            "training data should be shuffled, set shuffle=True."
        )


_INITIALISATION = (
    "A hook draws initial parameters after the training data are loaded; let __init__, setup or configure_model draw "
    "them"
)
_ORDER = (
    "The sampler draws from a generator of its own that depends on something else than the order's seed; let it draw "
    "from torch's global generator, or from a torch.Generator that is an attribute of the sampler"
)


def _compare(runs: Sequence[Run], source: Source, same: Callable[[Run, Run], bool], shared: str, remedy: str) -> bool:
    """Compare each run with the first that has the same seed of a source; return whether all other seeds agree, too.

    Raises:
        RecordingError: If runs with the same seed differ.
    """
    first: dict[int, Run] = {}
    for run in runs:
        seed = (run.manifest.seeds or {}).get(source)
        if seed is None:
            continue
        other = first.setdefault(seed, run)
        if not same(run, other):
            raise RecordingError(
                f"{run.path} and {other.path} have the same seed of the {source}, {seed}, but do not {shared}. "
                f"{remedy}, or record plain seeds."
            )
    found = list(first.values())
    return len(found) > 1 and all(same(found[0], other) for other in found[1:])


def _same_start(run: Run, other: Run) -> bool:
    return run is other or torch.equal(run.checkpoint(0).theta, other.checkpoint(0).theta)


def _same_batches(run: Run, other: Run) -> bool:
    last = min(run.steps, other.steps) - 1
    return run is other or all(
        torch.equal(first.indices, second.indices)
        for step in {0, last // 2, last}
        for first, second in zip(run.micro_batches(step), other.micro_batches(step), strict=False)
    )


def _said(seeds: Mapping[Source, int] | None) -> str:
    return "a single seed" if seeds is None else " and ".join(f"{source} {seed}" for source, seed in seeds.items())
