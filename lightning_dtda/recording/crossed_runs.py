"""Checks of recorded runs with seeds set apart: runs that share a seed must share what it decides, and no others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lightning_dtda.errors import RecordingError
from lightning_dtda.recording.crossed_seeds import CrossedSeeds
from lightning_dtda.recording.recorder import run_name
from lightning_dtda.recording.seeds import is_complete
from lightning_dtda.trajectory import Run
from lightning_dtda.trajectory.manifest import Source
from lightning_dtda.trajectory.traces import FIXED, Outcome, agree


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


class CrossedRuns:
    """Compares the runs of a crossed ensemble as they become complete.

    Runs with the same seed of the initialisation must start from the same parameters and buffers; those with the same
    seed of the order must have the same batches; and those with the same seed of the noise must draw the same numbers
    at the same step. Of the runs that differ in the seed of one source alone, some must differ in what it decides.

    Args:
        root: Directory of the ensemble.
        crossed: The seeds that it combines.
    """

    def __init__(self, root: Path, crossed: CrossedSeeds) -> None:
        self._root = root
        self._levels = crossed.levels
        self._compared: set[int] = set()
        self._same: dict[tuple[Source, int], Outcome] = {}
        self._others: dict[tuple[Source, frozenset[tuple[Source, int]]], Outcome] = {}
        self._varying: set[Source] = set()
        self._alike: dict[Source, set[frozenset[int]]] = {}

    def add(self, seed: int) -> None:
        """Compare a run with those before, if it is complete and was not compared yet.

        Raises:
            RecordingError: If runs that share a seed differ, or the seeds of a source change nothing, so the variance
                cannot be split by source.
        """
        directory = self._root / run_name(seed)
        if seed in self._compared or not is_complete(directory):
            return
        self._compared.add(seed)
        run = Run(directory)
        if not run.manifest.seeds:
            return
        outcome = Outcome.of(run)
        for source, of_source in outcome.seeds.items():
            first = self._same.setdefault((source, of_source), outcome)
            if agree(first.traces[source], outcome.traces[source]) is False:
                does, remedy = _SHARED[source]
                raise RecordingError(
                    f"{directory} and {first.path} have the same seed of the {source}, {of_source}, but do not {does}. "
                    f"{remedy}, or record plain seeds. Runs recorded so far do not fit those: choose another directory."
                )
        for source in outcome.seeds.keys() - self._varying:
            rest = frozenset((other, number) for other, number in outcome.seeds.items() if other != source)
            first = self._others.setdefault((source, rest), outcome)
            if first is outcome or (differs := first.differs(outcome, source)) is None:
                continue
            if differs:
                self._varying.add(source)
                continue
            alike = self._alike.setdefault(source, set())
            alike.add(frozenset((first.seeds[source], outcome.seeds[source])))
            if len(alike) >= min(_ALIKE, len(self._levels[source]) - 1):
                raise RecordingError(
                    f"Runs that differ only in the seed of the {source}, such as {first.path} and {directory}, "
                    f"{FIXED[source]}: the {source} contributes nothing to the variance. {_FIXED[source]}. Then record "
                    "into another directory."
                )


_ALIKE = 3
"""Number of pairs of seeds that must be alike: a single one may be by chance, as where a seed picks one of three."""

_SHARED: dict[Source, tuple[str, str]] = {
    "initialisation": (
        "start from the same parameters and buffers",
        "A hook draws initial parameters after the training data are loaded, or the networks share layers that an "
        "earlier training changed; let __init__, setup or configure_model make and draw all of them",
    ),
    "order": (
        "have the same batches",
        "The sampler draws when it is made, or from a generator with a seed of its own; let its __iter__ draw from the "
        "global generators, or from a generator that is an attribute of the sampler",
    ),
    "noise": (
        "draw the same numbers at the same step",
        "They come from a generator with a seed of its own, or a hook seeds the generators; let training_step and the "
        "data set draw from the global generators",
    ),
}
"""What runs that share a seed have in common, and what to do if they do not."""

_FIXED: dict[Source, str] = {
    "initialisation": "Leave out its seeds, or let the seed decide the initial parameters",
    "order": (
        "Set shuffle=True; let a sampler of your own draw from the global generators each time it is iterated over; or "
        "leave out the seeds of the order"
    ),
    "noise": "Leave out its seeds, or let training_step and the data set draw from the global generators",
}
"""What to do about a source whose seeds change nothing."""


def _said(seeds: Mapping[Source, int] | None) -> str:
    return "a single seed" if seeds is None else " and ".join(f"{source} {seed}" for source, seed in seeds.items())
