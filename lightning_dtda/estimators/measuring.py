"""The measurement of recorded runs, and its derivatives: where reverse sweeps start and forward sweeps end."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_dtda.replay import Measurement, Replay
from lightning_dtda.replay.measured import measured


def measure(
    replay: Replay, batch: Any, measurement: Measurement, step: int | None = None
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    r"""Return :math:`m(\theta_t)` of stacked runs, and its derivatives.

    Args:
        replay: The runs.
        batch: Q queries.
        measurement: m.
        step: t; the end of training if not given.

    Returns:
        Values ``(runs, queries)``, gradients ``(runs, queries, P)``, and those by running statistics, each
        ``(runs, queries, ...)``.

    Raises:
        AttributionError: If the measurement cannot be differentiated, or is not finite.
    """
    step = replay.steps if step is None else step
    theta, buffers = replay.trained(step)
    return measured(replay.module, theta, buffers, batch, measurement, places(replay, step))


def places(replay: Replay, step: int) -> list[str]:
    """Return what errors call the runs after a number of steps."""
    return [f"{'the end' if step == replay.steps else f'step {step}'} of {run.path}" for run in replay.runs]
