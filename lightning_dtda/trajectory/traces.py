"""What each source of randomness decided in a run: checksums by which runs of a crossed ensemble are compared."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TypeAlias, get_args

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


@dataclass(frozen=True)
class Outcome:
    """What decided a run, and what came of it.

    Args:
        path: Run directory.
        seeds: Seed of each source that the ensemble crosses.
        traces: Checksums of what each source decided.
        end: Checksum of the last checkpoint.
    """

    path: Path
    seeds: dict[Source, int]
    traces: dict[Source, Traces]
    end: int

    @classmethod
    def of(cls, run: Run) -> Outcome:
        """Read the outcome of a complete run."""
        return cls(run.path, dict(run.manifest.seeds or {}), traces_of(run), run.checksum)

    def differs(self, other: Outcome, source: Source) -> bool | None:
        """Return whether a source decided something else in another run, with other seeds of this source alone.

        Traces that differ show it. Those that agree are of a few steps, and not of all that may be drawn: gradients may
        get noise, and some batches only. If nothing changed, however, both runs end in the same parameters and buffers.

        Returns:
            ``None`` if it is unknown: a source without seeds of its own may be the reason for other ends, too. For the
            initialisation and the order, the traces then suffice.
        """
        agreed = agree(self.traces[source], other.traces[source])
        if not agreed:
            return None if agreed is None else True
        if self.end == other.end:
            return False
        if self.seeds.keys() == {*get_args(Source)}:
            return True
        return None if source == "noise" else False


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
    outcomes: dict[str, Outcome] = {}
    found = []
    for source in sources:
        alone: dict[frozenset[tuple[Source, int]], list[Run]] = {}  # runs that differ in this source alone
        for run in runs:
            rest = frozenset((other, seed) for other, seed in (run.manifest.seeds or {}).items() if other != source)
            alone.setdefault(rest, []).append(run)
        compared = []
        for pair in (pair for together in alone.values() for pair in pairwise(together)):
            for run in pair:
                if run.name not in outcomes:
                    outcomes[run.name] = Outcome.of(run)
            first, second = (outcomes[run.name] for run in pair)
            compared.append(first.differs(second, source))
            if compared[-1] is not False:  # usually the first two differ, and nothing more is read
                break
        if compared and compared[-1] is False:
            found.append(source)
    return found


def _checksum(tensors: Iterable[Tensor]) -> bytes:
    digest = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()
