"""A run must fit those that are in its root already: found before the training, not when the ensemble is opened."""

from __future__ import annotations

from pathlib import Path

from lightning_dtda.errors import RecordingError, TrajectoryError
from lightning_dtda.trajectory import Manifest, Run
from lightning_dtda.trajectory.example_checksums import ExampleChecksums, list_examples
from lightning_dtda.trajectory.manifest import MANIFEST, differences

_SAME_DATA = (
    "All runs of an ensemble are trained on the same data, in the same order. If the data are split, drawn or shuffled "
    "at random, this follows the seed: use a generator with a seed of its own, random_split(dataset, lengths, "
    "generator=torch.Generator().manual_seed(0)). Runs on other data belong in a root of their own."
)


def refuse_other_configuration(directory: Path, manifest: Manifest, checksums: ExampleChecksums | None = None) -> None:
    """Refuse a run that would be no sample of the same distribution as a complete run in the same root.

    Args:
        directory: The run's own; what is in it does not count.
        manifest: The run's.
        checksums: Of its training examples.

    Raises:
        RecordingError: Naming the other run, what differs and what to do.
    """
    other = _complete_run(directory)
    if other is None:
        return
    begin = f"{directory} is to be recorded beside {other.path}, which was trained"
    found = differences(other.manifest.comparable, manifest.comparable)
    recorded = other.example_checksums
    if recorded is None or checksums is None or recorded.length != checksums.length:
        changed = []
    else:
        changed = recorded.changed(checksums)
    if changed:
        raise RecordingError(f"{begin} on other data: example {list_examples(changed)} is another one. {_SAME_DATA}")
    if other.manifest.configuration["dataset"] != manifest.configuration["dataset"]:
        raise RecordingError(f"{begin} on other data:\n{found}\n{_SAME_DATA}")
    if found:
        raise RecordingError(
            f"{begin} with another configuration:\n{found}\nKeep each configuration in a root of its own, or delete "
            "the runs of the other one."
        )


def _complete_run(directory: Path) -> Run | None:
    """Return a complete run beside a run; one that is damaged is reported when the ensemble is opened."""
    for path in sorted(directory.parent.glob(f"*/{MANIFEST}")):
        try:
            # by the manifest first, which is all that most runs have to be asked
            if path.parent != directory and Manifest.load(path.parent).status == "complete":
                return Run(path.parent)
        except TrajectoryError:
            continue
    return None
