"""Measurements of recorded runs and their derivatives: the start of reverse sweeps and the end of forward sweeps."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_dtda.estimators.estimator import Question
from lightning_dtda.replay import Examples, Replay
from lightning_dtda.replay.measured import measured


def measure(
    replay: Replay, question: Question, numbers: Sequence[int], step: int | None = None, of: Examples | None = None
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    r"""Return :math:`m(\theta_t)` of stacked runs and its derivatives.

    Args:
        replay: The runs.
        question: The question, with queries and measurement.
        numbers: Numbers of Q queries.
        step: Step t; the end of training if not given.
        of: Examples to measure instead of the queries.

    Returns:
        Values ``(runs, queries)``, gradients ``(runs, queries, P)``, and gradients with respect to running statistics,
        each ``(runs, queries, ...)``.

    Raises:
        AttributionError: If the measurement cannot be differentiated, or is not finite.
    """
    step = replay.steps if step is None else step
    return measure_at(replay, *replay.trained(step), question, numbers, step, of)


def measure_at(
    replay: Replay,
    theta: Tensor,
    buffers: dict[str, Tensor],
    question: Question,
    numbers: Sequence[int],
    step: int,
    of: Examples | None = None,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Like :func:`measure`, for given parameters ``(runs, P)`` and buffers."""
    end = "the end" if step == replay.steps else f"step {step}"
    return measured(
        replay.eager,
        theta,
        buffers,
        question.queries if of is None else of,
        [int(number) for number in numbers],
        question.measurement,
        [f"{end} of {run.path}" for run in replay.runs],
        replay.time(step),
        question.draws,
    )
