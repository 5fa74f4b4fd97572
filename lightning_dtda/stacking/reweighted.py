"""Recorded trainings repeated in their recorded order without some examples, many at once."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter

import torch
from torch import Tensor

from lightning_dtda.replay import Replay
from lightning_dtda.stacking.size import stack_size

_STACKED_SECONDS = 5.0
"""Seconds that trainings would take one by one, above which they are stacked: tracing takes a second or two."""


def prepared(replay: Replay, trainings: int) -> tuple[Replay, int]:
    """Return the replay of a run, stacked if that is worth it, and the number of trainings to repeat at once."""
    start, buffers = replay.checkpoint(0)[0], replay.buffers(0)

    def step() -> None:
        replay.gradient(0, start, buffers)

    step()  # the first call finds out where weights act
    started = perf_counter()
    step()
    if (perf_counter() - started) * replay.steps * trainings > _STACKED_SECONDS:
        replay = replay.stack()
    return replay, stack_size(step, start, trainings, replay.device)


def without(
    replay: Replay, removed: Sequence[Sequence[int]], stop: int | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""Repeat trainings, each without some examples, after a comparison of the first stretch with the record.

    .. math:: g_t(\theta, w) = \sum_z J_z(\theta)^\top \left(w \odot \frac{\partial L_t}{\partial z}\right),
        \qquad w_n = 0 \text{ for } n \in S

    Order, batch slots and the divisor of the loss stay the same: responses are the derivative of this function of the
    weights (arXiv 2506.12965, section 2).

    Args:
        replay: Replay of the trainings; the same run may occur several times.
        removed: Examples to leave out, for each training.
        stop: Step to stop before; the end of training if not given.

    Returns:
        Parameters ``(trainings, P)`` and buffers, each ``(trainings, ...)``.

    Raises:
        ReplayError: If the replay with all examples deviates from the record.
    """
    weights = torch.ones(len(removed), len(replay.examples), dtype=replay.dtype, device=replay.device)
    start, end = replay.stretches[0]
    again = replay.retrain(weights, start, end, averaged=False)[0]
    replay.compare(start, end, replay.checkpoint(start)[0], again)
    for row, examples in enumerate(removed):
        weights[row, list(examples)] = 0
    return replay.retrain(weights, 0, stop)
