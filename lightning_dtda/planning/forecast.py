"""Costs of recording and attributing, and advice on which estimator to choose."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lightning_dtda.execution.memory import available_memory
from lightning_dtda.units import human_bytes, human_seconds

_MUCH_FASTER = 5.0
"""Ratio of times above which a faster but less accurate estimator is mentioned."""


@dataclass(frozen=True)
class Cost:
    """The cost of a task.

    Args:
        seconds: Duration; ``None`` if it is unknown.
        memory: Bytes of memory in addition to libraries, module and data.
        disk: Bytes on disk.
    """

    seconds: float | None
    memory: float
    disk: float

    def times(self, factor: float) -> Cost:
        """Return the cost of several such tasks, one after the other."""
        return Cost(None if self.seconds is None else factor * self.seconds, self.memory, factor * self.disk)


@dataclass(frozen=True)
class Forecast:
    """Costs of recording and attributing; memory is in addition to libraries, module and data.

    Args:
        runs: S, the number of runs.
        steps: T, the number of steps of each run.
        parameters: P, the number of parameters.
        examples: N, the number of training examples.
        queries: Q, the number of queries.
        removals: K, the number of removals.
        device: Device for attributing.
        workers: Number of processes that the runs are distributed over.
        recorded_steps: Number of steps that were tried, from which the cost of T steps is extrapolated.
        recorded_examples: Number of examples in the data, from which the cost of N examples is extrapolated.
        given_queries: Number of given queries, from which the cost of Q queries is extrapolated.
        recording: Cost of recording all runs; its memory is in addition to that of the training.
        estimators: Cost of attributing all runs by estimator, or the reason why it is not possible.
        advice: Which estimator to choose.
    """

    runs: int
    steps: int
    parameters: int
    examples: int
    queries: int
    removals: int
    device: str
    workers: int
    recorded_steps: int
    recorded_examples: int
    given_queries: int
    recording: Cost
    estimators: dict[str, Cost | str]
    advice: str = ""

    def content(self) -> dict[str, Any]:
        """Return the forecast as JSON, in seconds and bytes."""
        return asdict(self)


def advice(found: Forecast, device: torch.device, hours: float | None) -> str:
    """Return which estimator to choose: the first that fits memory, disk and time.

    Args:
        found: Forecast of all costs.
        device: Device for attributing, whose memory is checked.
        hours: Maximum hours that recording and attributing may take together.
    """
    memory, disk = available_memory(device), shutil.disk_usage(Path.cwd()).free
    recorded = found.recording.seconds or 0.0
    reasons: list[str] = []
    fit: list[tuple[str, float]] = []
    for name, cost in found.estimators.items():
        if isinstance(cost, str):
            reasons.append(f"{name} is not possible: {cost.rstrip('.')}")
            continue
        seconds, on_disk = cost.seconds or 0.0, found.recording.disk + cost.disk
        if memory is not None and cost.memory > memory:
            reasons.append(f"{name} needs {human_bytes(cost.memory)} of memory, but {human_bytes(memory)} are free")
        elif on_disk > disk:
            reasons.append(
                f"{name} and the record need {human_bytes(on_disk)} of disk space, but {human_bytes(disk)} are free"
            )
        elif hours is not None and recorded + seconds > 3600 * hours:
            reasons.append(f"{name} and the recording take {human_seconds(recorded + seconds)}")
        else:
            fit.append((name, seconds))
    if not found.estimators:
        return ""
    if not fit:
        return (
            f"Nothing fits: {'; '.join(reasons)}. Use fewer queries, record fewer runs or less of each "
            '(gradients="none"), lower memory_budget, or distribute the runs over a Ray cluster.'
        )
    chosen, seconds = fit[0]
    said = f"Choose {chosen}: {human_seconds(seconds)}"
    if recorded:
        said += f", {seconds / recorded:.2g} times as long as the recording"
    fastest, least = min(fit, key=lambda one: one[1])
    if seconds > _MUCH_FASTER * least:
        reasons.insert(0, f"{fastest} takes {human_seconds(least)} and is less accurate")
    return "; ".join([said, *reasons]) + "."
