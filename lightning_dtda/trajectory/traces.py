"""What each source of randomness decided in a run: checksums by which runs of a crossed ensemble are compared."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable, Sequence
from itertools import pairwise
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_dtda.trajectory.manifest import Source
from lightning_dtda.trajectory.run import Run

Traces: TypeAlias = dict[Hashable, bytes]
"""Checksums of what a source decided, by where in the run."""

FIXED: dict[Source, str] = {
    "initialisation": "start from the same parameters",
    "order": "have the same batches",
    "noise": "draw no other random numbers in training",
}
"""What is said of runs for which the seed of a source changes nothing."""


def traces_of(run: Run) -> dict[Source, Traces]:
    """Return checksums of what each source decided in a run, at the first, the middle, the last and a few other steps.

    Args:
        run: A complete run.
    """
    start = run.checkpoint(0)
    buffers = [start.buffers[name] for name in sorted(start.buffers)]
    found: dict[Source, Traces] = {"initialisation": {0: _checksum([start.theta, *buffers])}}
    order: Traces = {}
    noise: Traces = {}
    # few, as each may be in another file of 64 MiB; the powers are for runs of different length
    steps = {0, run.steps // 2, run.steps - 1, *(64**power for power in range(1, 8))}
    for step in sorted(step for step in steps if step < run.steps):
        for number, part in enumerate(run.micro_batches(step)):
            order[step, number] = batch = _checksum([part.indices])
            for name, state in part.rng_states.items():
                noise[step, number, name] = _checksum([state])
            if part.leaves:  # augmentation, which only the same examples can share
                noise[step, number, batch] = _checksum(part.leaves)
    return found | {"order": order, "noise": noise}


def agree(first: Traces, second: Traces) -> bool | None:
    """Return whether two runs have the same where both have something; ``None`` if they have nothing in common."""
    both = first.keys() & second.keys()
    if not both:
        return None if first or second else True
    return all(first[where] == second[where] for where in both)


def fixed_sources(runs: Sequence[Run]) -> list[Source]:
    """Return the sources whose seeds change nothing in the runs of a crossed ensemble.

    Args:
        runs: Its runs.
    """
    sources: list[Source] = [*(runs[0].manifest.seeds or {})]
    traces: dict[str, dict[Source, Traces]] = {}
    found = []
    for source in sources:
        alone: dict[frozenset[tuple[Source, int]], list[Run]] = {}  # runs that differ in this source alone
        for run in runs:
            rest = frozenset((other, seed) for other, seed in (run.manifest.seeds or {}).items() if other != source)
            alone.setdefault(rest, []).append(run)
        compared = []
        for first, second in (pair for together in alone.values() for pair in pairwise(together)):
            for run in (first, second):
                if run.name not in traces:
                    traces[run.name] = traces_of(run)
            compared.append(agree(traces[first.name][source], traces[second.name][source]))
            if compared[-1] is False:  # usually the first two differ, and nothing more is read
                break
        if compared and all(compared):
            found.append(source)
    return found


def _checksum(tensors: Iterable[Tensor]) -> bytes:
    digest = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()
