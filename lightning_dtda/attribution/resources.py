"""Whether there is enough memory and disk space for an attribution."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import torch

from lightning_dtda.errors import AttributionError
from lightning_dtda.estimators import Estimator, Plan, Question
from lightning_dtda.execution.memory import available_memory, resident_memory
from lightning_dtda.trajectory import Run
from lightning_dtda.units import human_bytes, human_seconds

_log = logging.getLogger(__name__)


def response_bytes(run: Run, estimator: Estimator) -> int:
    """Return the size of one response in bytes."""
    is_double = estimator.settings().get("precision") == "float64"
    return torch.float64.itemsize if is_double else run.manifest.torch_dtype.itemsize


def check_resources(
    plan: Plan,
    estimator: Estimator,
    runs: list[Run],
    question: Question,
    path: Path | None,
    answers: int,
    processes: int,
) -> None:
    """Log the resources that an attribution needs, and check that they are available.

    Args:
        plan: Plan of the estimator.
        estimator: The estimator.
        runs: Runs to attribute.
        question: The question.
        path: Directory of the result; ``None`` means memory.
        answers: Number of results.
        processes: Number of processes on this machine, each of which needs the plan's memory.

    Raises:
        AttributionError: If there is not enough memory or disk space.
    """
    answer = answers * len(runs) * len(question.queries) * len(question.removals) * response_bytes(runs[0], estimator)
    stored = 0 if path else answer
    memory = processes * plan.memory + stored
    # what a process grows by includes freed memory, with less of which it would do
    of_process = plan.memory if plan.is_bound else resident_memory(plan.memory, question.device, plan.objects)
    _log.info(
        "Attributing %d runs, %d queries, %d removals: %s %s of memory, %s of disk, %s.",
        len(runs),
        len(question.queries),
        len(question.removals),
        "up to" if plan.is_bound else "about",
        human_bytes(processes * of_process + stored),
        human_bytes(answer if path else 0),
        human_seconds(plan.seconds / processes),
    )
    available = available_memory(question.device)
    if available is not None and memory > available:
        fewer = (", use fewer workers" if processes > 1 else "") + ("" if path else ", give an output")
        raise AttributionError(
            f"The attribution needs about {human_bytes(memory)} of memory, but {human_bytes(available)} is "
            f"available. Lower the estimator's memory_budget{fewer}, or use fewer queries at a time."
        )
    if path is not None:
        check_room(answer, path)


def check_room(answer: int, path: Path | None) -> None:
    """Check that there is space for a result.

    Args:
        answer: Size of the result in bytes.
        path: Directory on the disk where it is stored; ``None`` means memory.

    Raises:
        AttributionError: If there is not enough space.
    """
    if path is None:
        available = available_memory(torch.device("cpu"))
        if available is not None and answer > available:
            raise AttributionError(
                f"The result takes {human_bytes(answer)} of memory, but {human_bytes(available)} is available. Give an "
                "output, or use fewer queries at a time."
            )
    elif answer > (free := shutil.disk_usage(path).free):
        raise AttributionError(
            f"The result takes {human_bytes(answer)} of disk space, but {human_bytes(free)} is free at {path}. Free "
            "some space, or choose another output."
        )
