"""Many seeded runs on a Ray cluster, each recorded into a directory that all nodes share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from lightning_dtda.execution.ray_cluster import Lost, RayCluster
from lightning_dtda.recording.recorder import run_name
from lightning_dtda.recording.seeds import is_complete


def record_on_ray(
    cluster: RayCluster,
    record: Callable[[int], str | None],
    root: Path,
    seeds: Sequence[int],
    finished: Callable[[int], None],
) -> dict[int, str]:
    """Record each seed as a task of its own; one whose worker is lost is recorded again from its start.

    Args:
        cluster: Where.
        record: Records the run of a seed into ``root``, in another process and perhaps on another machine; returns
            what went wrong.
        root: The ensemble's directory.
        seeds: The seeds that are to be trained.
        finished: Called after each seed that was trained or failed.

    Returns:
        What went wrong, by seed.
    """
    failures = {}
    for done in cluster.run(record, seeds):
        for seed, result in done:
            reason = result.reason if isinstance(result, Lost) else result
            if reason is None and not is_complete(root / run_name(seed)):
                reason = (
                    f"its run is not in {root} on this machine. Let the ensemble be on a disk that all nodes share."
                )
            if reason is not None:
                failures[seed] = reason
            finished(seed)
    return failures
