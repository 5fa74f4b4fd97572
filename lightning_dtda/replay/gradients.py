"""A step's gradient, and how it and the losses change along directions of the parameters: what adjoints need."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.func import grad, jvp, vmap

from lightning_dtda.replay.dropout import Mask
from lightning_dtda.replay.functional import FunctionalModule
from lightning_dtda.replay.steps import StepBatch, pass_examples


def weighted_gradient(
    module: FunctionalModule, batch: StepBatch, theta: Tensor, buffers: dict[str, Tensor], coefficients: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""Return :math:`\sum_n c_n \nabla l_n(\theta)` ``(runs, P)``, and the running statistics after the step.

    Args:
        module: The module.
        batch: The step's.
        theta: Parameters ``(runs, P)``.
        buffers: Each ``(runs, ...)``.
        coefficients: c ``(runs, B)``, in place of the batch's own.
    """

    def loss(
        theta: Tensor, buffers: dict[str, Tensor], examples: Any, coefficients: Tensor, masks: list[Mask]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        losses, statistics = pass_examples(module, theta, buffers, examples, masks, batch)
        return (coefficients * losses).sum(), statistics

    derivative = vmap(grad(loss, has_aux=True))
    result: tuple[Tensor, dict[str, Tensor]] = derivative(theta, buffers, batch.examples, coefficients, batch.masks)
    return result


def directional_derivatives(
    module: FunctionalModule,
    batch: StepBatch,
    theta: Tensor,
    buffers: dict[str, Tensor],
    directions: Tensor,
    statistics_cotangents: dict[str, Tensor],
) -> tuple[Tensor, Tensor, dict[str, Tensor], Tensor]:
    r"""Differentiate a step's losses and their gradient along directions, in one pass.

    .. math::
        d_n = \partial_v l_n(\theta), \qquad H v = \partial_v g, \qquad g = \sum_n c_n \nabla l_n(\theta)

    Forward over reverse, so that all queries share one forward and one backward pass of the model. Running statistics
    of BatchNorm are part of the state, :math:`\sigma_{t+1} = F(\sigma_t, \theta_t)`. With the cotangent :math:`\mu` of
    :math:`\sigma_{t+1}`, what is added to H v is :math:`\nabla_\theta \langle \mu, F \rangle`: the same derivative of a
    gradient, that of :math:`\sum_n c_n l_n + \langle \nu, F \rangle` along :math:`\nu` from zero.

    Args:
        module: The module.
        batch: The step's.
        theta: Parameters ``(runs, P)``.
        buffers: Each ``(runs, ...)``.
        directions: v ``(runs, queries, P)``.
        statistics_cotangents: Of the running statistics after the step, each ``(runs, queries, ...)``.

    Returns:
        d ``(runs, queries, B)``, H v ``(runs, queries, P)``, the cotangents of the running statistics before the step,
        and g ``(runs, P)``.
    """

    def of_one_query(
        theta: Tensor,
        direction: Tensor,
        buffers: dict[str, Tensor],
        examples: Any,
        coefficients: Tensor,
        masks: list[Mask],
        statistics: dict[str, Tensor],
        cotangents: dict[str, Tensor],
    ) -> tuple[Tensor, Tensor, dict[str, Tensor], Tensor]:
        def loss(theta: Tensor, statistics: dict[str, Tensor], multipliers: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            losses, after = pass_examples(module, theta, buffers | statistics, examples, masks, batch)
            total = (coefficients * losses).sum()
            for name, multiplier in multipliers.items():
                total = total + (multiplier * after[name]).sum()
            return total, losses

        zeros = {name: torch.zeros_like(statistic) for name, statistic in statistics.items()}
        derivative = grad(loss, argnums=(0, 1), has_aux=True)
        at, along = (theta, statistics, zeros), (direction, zeros, cotangents)
        ((gradient, _), _), ((product, of_statistics), slopes) = jvp(derivative, at, along)  # type: ignore[misc]
        return slopes, product, of_statistics, gradient

    of_runs = vmap(vmap(of_one_query, in_dims=(None, 0, None, None, None, None, None, 0)))
    slopes, products, of_statistics, gradients = of_runs(
        theta,
        directions,
        buffers,
        batch.examples,
        batch.coefficients,
        batch.masks,
        {name: buffers[name] for name in module.statistics},
        statistics_cotangents,
    )
    return slopes, products, of_statistics, gradients[:, 0]  # the gradient is the same for every query
