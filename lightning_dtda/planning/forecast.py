"""What things take, and what to choose of them."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lightning_dtda.execution.memory import available_memory
from lightning_dtda.units import human_bytes, human_seconds

_MUCH_FASTER = 5.0
"""From which ratio of times on a less exact estimator is mentioned."""


@dataclass(frozen=True)
class Cost:
    """What something takes.

    Args:
        seconds: Time; ``None`` where it is not known.
        memory: Bytes beside libraries, module and data.
        disk: Bytes.
    """

    seconds: float | None
    memory: float
    disk: float

    def times(self, factor: float) -> Cost:
        """Return what so many of them take one after the other."""
        return Cost(None if self.seconds is None else factor * self.seconds, self.memory, factor * self.disk)


@dataclass(frozen=True)
class Forecast:
    """What recording and attributing take; memory is beside libraries, module and data.

    Args:
        runs: S.
        steps: T of each.
        parameters: P.
        examples: N.
        queries: Q.
        removals: K.
        device: Where it is computed.
        workers: Processes that share the runs out.
        recorded_steps: Steps of a run that were there to measure, from which all T are extrapolated.
        recorded_examples: The number of examples that the data have, from which N are extrapolated.
        given_queries: The number of queries that were given, from which Q are extrapolated.
        recording: Of all runs; its memory is beside the training's.
        estimators: Of attributing all runs, by estimator; a text says why one cannot.
        advice: What to choose.
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
        """Return all of it in JSON: seconds and bytes."""
        return asdict(self)


def advice(found: Forecast, device: torch.device, hours: float | None) -> str:
    """Return which estimator to choose: the first that fits memory, disk and time.

    Args:
        found: What everything takes.
        device: Whose memory counts.
        hours: The most that recording and attributing may take together.
    """
    memory, disk = available_memory(device), shutil.disk_usage(Path.cwd()).free
    recorded = found.recording.seconds or 0.0
    reasons: list[str] = []
    fit: list[tuple[str, float]] = []
    for name, cost in found.estimators.items():
        if isinstance(cost, str):
            reasons.append(f"{name} cannot: {cost.rstrip('.')}")
            continue
        seconds, on_disk = cost.seconds or 0.0, found.recording.disk + cost.disk
        if memory is not None and cost.memory > memory:
            reasons.append(f"{name} needs {human_bytes(cost.memory)} of memory, {human_bytes(memory)} are free")
        elif on_disk > disk:
            reasons.append(
                f"{name} and the record need {human_bytes(on_disk)} of disk, {human_bytes(disk)} are free here"
            )
        elif hours is not None and recorded + seconds > 3600 * hours:
            reasons.append(f"{name} and the recording take {human_seconds(recorded + seconds)}")
        else:
            fit.append((name, seconds))
    if not found.estimators:
        return ""
    if not fit:
        return (
            f"Nothing fits: {'; '.join(reasons)}. Ask fewer queries, record fewer runs or less of each "
            '(gradients="none"), lower memory_budget, or share the runs out on a Ray cluster.'
        )
    chosen, seconds = fit[0]
    said = f"Choose {chosen}: {human_seconds(seconds)}"
    if recorded:
        said += f", {seconds / recorded:.2g} times the recording"
    fastest, least = min(fit, key=lambda one: one[1])
    if seconds > _MUCH_FASTER * least:
        reasons.insert(0, f"{fastest} takes {human_seconds(least)} and is less exact")
    return "; ".join([said, *reasons]) + "."
