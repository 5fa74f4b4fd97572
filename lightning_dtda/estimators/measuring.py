"""The measurement of recorded runs, and its gradient: where reverse sweeps start."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.func import grad, vmap

from lightning_dtda.errors import AttributionError, DTDAError
from lightning_dtda.replay import Measurement, Replay
from lightning_dtda.replay.batches import map_tensors


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
    theta, buffers = replay.trained(replay.steps if step is None else step)

    def of_one_query(
        theta: Tensor, statistics: dict[str, Tensor], buffers: dict[str, Tensor], query: Any
    ) -> tuple[Tensor, Tensor]:
        single = map_tensors(lambda leaf: leaf.unsqueeze(0), query)
        value = replay.module.measure(theta, buffers | statistics, single, measurement)
        if value.shape != (1,):
            raise AttributionError(
                f"The measurement returned shape {tuple(value.shape)} for one query; it must return (B,) for a batch."
            )
        return value[0], value[0]

    derivative = grad(of_one_query, argnums=(0, 1), has_aux=True)
    of_one_run = vmap(derivative, in_dims=(None, None, None, 0))
    try:
        arguments = (theta, replay.statistics(buffers), buffers, batch)
        (gradients, of_statistics), values = vmap(of_one_run, in_dims=(0, 0, 0, None))(*arguments)
    except DTDAError:
        raise
    except Exception as error:  # whatever the user's code does
        raise AttributionError(
            f"The measurement fails ({error!r}). It is called with the module and a batch of one query, and torch.func "
            "has to be able to differentiate it and to map it over queries: no .item(), float(), print, or branch on a "
            "value."
        ) from error
    where = "the end" if step in (None, replay.steps) else f"step {step}"
    for what, tensor in (("", values), ("the gradient of ", gradients)):
        if not bool(torch.isfinite(tensor).all()):
            number = int((~torch.isfinite(tensor.reshape(len(tensor), -1))).any(1).nonzero()[0])
            raise AttributionError(
                f"{what}the measurement is not finite at {where} of {replay.runs[number].path}. The training diverged, "
                "or the measurement has no value there; leave the run out."
            )
    return values.detach(), gradients.detach(), of_statistics
