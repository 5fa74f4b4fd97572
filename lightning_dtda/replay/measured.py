"""Measurements of trained models, and how they change with the models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, vmap

from lightning_dtda.errors import AttributionError, DTDAError
from lightning_dtda.replay.batches import map_tensors
from lightning_dtda.replay.functional import FunctionalModule
from lightning_dtda.replay.measurements import Measurement


def measured(
    module: FunctionalModule,
    theta: Tensor,
    buffers: dict[str, Tensor],
    batch: Any,
    measurement: Measurement,
    where: Sequence[str],
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    r"""Take a measurement of stacked models, and its derivatives.

    Args:
        module: The module.
        theta: Parameters ``(runs, P)``.
        buffers: Buffers and frozen parameters, each ``(runs, ...)``.
        batch: Q queries.
        measurement: m.
        where: What errors call each of the models: "the end of runs/seed-0001".

    Returns:
        :math:`m(\theta)` ``(runs, queries)``, its gradient ``(runs, queries, P)``, and those by BatchNorm's running
        statistics, each ``(runs, queries, ...)``.

    Raises:
        AttributionError: If it cannot be differentiated, or is not finite.
    """

    def of_one_query(
        theta: Tensor, statistics: dict[str, Tensor], buffers: dict[str, Tensor], query: Any
    ) -> tuple[Tensor, Tensor]:
        single = map_tensors(lambda leaf: leaf.unsqueeze(0), query)
        value = module.measure(theta, buffers | statistics, single, measurement)
        if value.shape != (1,):
            raise AttributionError(
                f"The measurement returned shape {tuple(value.shape)} for one query; it must return (B,) for a batch."
            )
        return value[0], value[0]

    derivative = grad(of_one_query, argnums=(0, 1), has_aux=True)
    of_one_run = vmap(derivative, in_dims=(None, None, None, 0))
    statistics = {name: buffers[name] for name in module.statistics}
    try:
        (gradients, of_statistics), values = vmap(of_one_run, in_dims=(0, 0, 0, None))(
            theta, statistics, buffers, batch
        )
    except DTDAError:
        raise
    except Exception as error:  # whatever the user's code does
        raise AttributionError(
            f"The measurement fails ({error!r}). It is called with the module and a batch of one query, and torch.func "
            "has to be able to differentiate it and to map it over queries: no .item(), float(), print, or branch on a "
            "value."
        ) from error
    for what, tensor in (("", values), ("the gradient of ", gradients)):
        if not bool(torch.isfinite(tensor).all()):
            number = int((~torch.isfinite(tensor.reshape(len(tensor), -1))).any(1).nonzero()[0])
            raise AttributionError(
                f"{what}the measurement is not finite at {where[number]}. The training diverged, "
                "or the measurement has no value there; leave the run out."
            )
    return values.detach(), gradients.detach(), of_statistics
