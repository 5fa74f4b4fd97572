"""Checks before the training that a new run fits the other runs in its root, not only when the ensemble is opened."""

from __future__ import annotations

from pathlib import Path

from lightning_dtda.errors import RecordingError, TrajectoryError
from lightning_dtda.trajectory import Manifest, Run
from lightning_dtda.trajectory.example_checksums import ExampleChecksums, list_examples
from lightning_dtda.trajectory.manifest import MANIFEST, mismatch

_SAME_DATA = (
    "All runs of an ensemble must be trained on the same data, in the same order. If the data are split, drawn or "
    "shuffled at random, they change with the seed: use a separate generator with a fixed seed, random_split(dataset, "
    "lengths, generator=torch.Generator().manual_seed(0)). Record runs on other data in a separate root."
)


def refuse_other_configuration(directory: Path, manifest: Manifest, checksums: ExampleChecksums | None = None) -> None:
    """Refuse a run that would not be a sample of the same distribution as a complete run in the same root.

    Args:
        directory: Directory of the run; its content is ignored.
        manifest: Manifest of the run.
        checksums: Checksums of the run's training examples.

    Raises:
        RecordingError: If the configuration or the data differ. The message names the other run, what differs and what
            to do.
    """
    other = _complete_run(directory)
    if other is None:
        return
    begin = f"{directory} cannot be recorded in the same root as {other.path}, which was trained"
    found = mismatch(other.manifest.comparable, manifest.comparable)
    recorded = other.example_checksums
    if recorded is None or checksums is None or recorded.length != checksums.length:
        changed = []
    else:
        changed = recorded.changed(checksums)
    if changed:
        raise RecordingError(f"{begin} on other data: example {list_examples(changed)} is different. {_SAME_DATA}")
    if other.manifest.configuration["dataset"] != manifest.configuration["dataset"]:
        raise RecordingError(f"{begin} on other data:\n{found}\n{_SAME_DATA}")
    if found:
        raise RecordingError(
            f"{begin} with another configuration:\n{found}\nKeep each configuration in a separate root, or delete "
            "the runs with the other one."
        )


def _complete_run(directory: Path) -> Run | None:
    """Return another complete run in the same root; damaged ones are reported when the ensemble is opened."""
    for path in sorted(directory.parent.glob(f"*/{MANIFEST}")):
        try:
            # the manifest first, which is enough for most runs
            if path.parent != directory and Manifest.load(path.parent).status == "complete":
                return Run(path.parent)
        except TrajectoryError:
            continue
    return None
