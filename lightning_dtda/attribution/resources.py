"""Whether there is the memory and the disk that an attribution will take."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import torch

from lightning_dtda.errors import AttributionError
from lightning_dtda.estimators import Estimator, Plan, Question
from lightning_dtda.execution.memory import available_memory
from lightning_dtda.trajectory import Run
from lightning_dtda.units import human_bytes, human_seconds

_log = logging.getLogger(__name__)


def response_bytes(run: Run, estimator: Estimator) -> int:
    """Return the bytes of one response of an estimator to a run."""
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
    """Say what an answer will take, and make sure that there is so much.

    Args:
        plan: The estimator's.
        estimator: What will answer.
        runs: That are attributed.
        question: What is asked.
        path: Where the answer goes; ``None`` is the memory.
        answers: How many answers there will be.
        processes: Number of processes of this machine, each of which takes the plan's memory.

    Raises:
        AttributionError: If there is too little memory or disk.
    """
    answer = answers * len(runs) * len(question.queries) * len(question.removals) * response_bytes(runs[0], estimator)
    memory = processes * plan.memory + (0 if path else answer)
    _log.info(
        "Attributing %d runs, %d queries, %d removals: about %s of memory, %s of disk, %s.",
        len(runs),
        len(question.queries),
        len(question.removals),
        human_bytes(memory),
        human_bytes(answer if path else 0),
        human_seconds(plan.seconds / processes),
    )
    available = available_memory(question.device)
    if available is not None and memory > available:
        fewer = (", take fewer workers" if processes > 1 else "") + ("" if path else ", give an output")
        raise AttributionError(
            f"This needs about {human_bytes(memory)} of memory; {human_bytes(available)} are "
            f"available. Lower the estimator's memory_budget{fewer}, or ask fewer queries at a time."
        )
    if path is not None:
        check_room(answer, path)


def check_room(answer: int, path: Path | None) -> None:
    """Make sure that there is room for an answer.

    Args:
        answer: Its bytes.
        path: A directory on the disk that it goes to; ``None`` is the memory.

    Raises:
        AttributionError: If there is none.
    """
    if path is None:
        available = available_memory(torch.device("cpu"))
        if available is not None and answer > available:
            raise AttributionError(
                f"The answer takes {human_bytes(answer)} of memory; {human_bytes(available)} are available. Give an "
                "output, or ask fewer queries at a time."
            )
    elif answer > (free := shutil.disk_usage(path).free):
        raise AttributionError(
            f"The answer takes {human_bytes(answer)} of disk; {human_bytes(free)} are free under {path}. Free "
            "some, or choose another output."
        )
