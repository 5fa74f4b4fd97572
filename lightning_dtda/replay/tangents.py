"""Forward mode: how the state of a training changes with the weights of examples, carried through its steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, jvp, vmap

from lightning_dtda.optimizers import Clipping, GroupedUpdate, Hyperparameters, State
from lightning_dtda.replay.dropout import Mask
from lightning_dtda.replay.functional import FunctionalModule
from lightning_dtda.replay.steps import Point, StepBatch, pass_examples


@dataclass(frozen=True)
class Tangents:
    r"""Derivatives of a training's state along removals, :math:`\sum_{n \in S_k} -\partial / \partial w_n`.

    Args:
        theta: Of the parameters, the responses :math:`r_k` ``(runs, removals, P)``.
        states: Of each group's optimizer state.
        statistics: Of BatchNorm's running statistics, each ``(runs, removals, ...)``.
    """

    theta: Tensor
    states: list[State]
    statistics: dict[str, Tensor]

    @classmethod
    def zeros(cls, theta: Tensor, states: Sequence[State], statistics: dict[str, Tensor], removals: int) -> Tangents:
        """Return what they are before the first step, for a state of which each part is ``(runs, ...)``."""

        def zeros(part: Tensor) -> Tensor:
            return part.new_zeros(len(part), removals, *part.shape[1:])

        return cls(
            zeros(theta),
            [{key: zeros(part) for key, part in state.items()} for state in states],
            {name: zeros(part) for name, part in statistics.items()},
        )


@dataclass(frozen=True)
class Position:
    """Where a forward sweep has come to.

    Args:
        step: t, the number of steps taken.
        theta: Parameters ``(runs, P)``.
        states: Each group's optimizer state.
        buffers: Buffers and frozen parameters by name, each ``(runs, ...)``.
        tangents: Of all these.
    """

    step: int
    theta: Tensor
    states: list[State]
    buffers: dict[str, Tensor]
    tangents: Tangents


def gradient_tangents(
    module: FunctionalModule,
    batch: StepBatch,
    theta: Tensor,
    buffers: dict[str, Tensor],
    coefficient_tangents: Tensor,
    tangents: Tangents,
) -> tuple[Tensor, dict[str, Tensor], Tensor, dict[str, Tensor]]:
    r"""Differentiate a step's gradient along its parameters, running statistics and coefficients, in one pass.

    .. math::
        g = \sum_n c_n \nabla l_n(\theta), \qquad \dot g_k = H r_k + \sum_n \dot c_{kn} \nabla l_n(\theta)

    Forward over reverse, so that all removals share one forward and one backward pass of the model.

    Args:
        module: The module.
        batch: The step's.
        theta: Parameters ``(runs, P)``.
        buffers: Each ``(runs, ...)``.
        coefficient_tangents: :math:`\dot c` ``(runs, removals, B)``.
        tangents: Of parameters and running statistics before the step.

    Returns:
        g ``(runs, P)`` and the running statistics after the step; and the tangents of both, removals in their second
        dimension.
    """

    def of_one_removal(
        theta: Tensor,
        statistics: dict[str, Tensor],
        coefficients: Tensor,
        buffers: dict[str, Tensor],
        examples: Any,
        masks: list[Mask],
        along: tuple[Tensor, dict[str, Tensor], Tensor],
    ) -> tuple[Any, Any]:
        def loss(
            theta: Tensor, statistics: dict[str, Tensor], coefficients: Tensor
        ) -> tuple[Tensor, dict[str, Tensor]]:
            losses, after = pass_examples(module, theta, buffers | statistics, examples, masks, batch)
            return (coefficients * losses).sum(), after

        found: tuple[Any, Any] = jvp(grad(loss, has_aux=True), (theta, statistics, coefficients), along)  # type: ignore[assignment]
        return found

    of_one_run = vmap(of_one_removal, in_dims=(None, None, None, None, None, None, 0))
    statistics = {name: buffers[name] for name in module.statistics}
    (gradient, after), (of_gradient, of_after) = vmap(of_one_run)(
        theta,
        statistics,
        batch.coefficients,
        buffers,
        batch.examples,
        batch.masks,
        (tangents.theta, tangents.statistics, coefficient_tangents),
    )
    # the same for every removal
    return gradient[:, 0], {name: part[:, 0] for name, part in after.items()}, of_gradient, of_after


def push(
    update: GroupedUpdate,
    clipping: Clipping,
    hyperparameters: Sequence[Hyperparameters],
    step: int,
    point: Point,
    tangents: Tangents,
    gradient_tangents: Tensor,
    statistics_tangents: dict[str, Tensor],
) -> Tangents:
    """Push tangents through clipping and the optimizer's update.

    Args:
        update: The optimizer's.
        clipping: The Trainer's.
        hyperparameters: Of each group; tensors broadcast against ``(runs, removals, P)``.
        step: t.
        point: What the step starts from.
        tangents: Before the step.
        gradient_tangents: Of the gradient of the step's loss ``(runs, removals, P)``.
        statistics_tangents: Of the running statistics after the step.

    Returns:
        The tangents after the step.
    """
    with torch.no_grad():
        theta, states = update.tangent(
            point.theta.unsqueeze(1),
            [{key: part.unsqueeze(1) for key, part in state.items()} for state in point.states],
            point.gradient.unsqueeze(1),
            hyperparameters,
            tangents.theta,
            tangents.states,
            clipping.tangent(point.unclipped.unsqueeze(1), gradient_tangents),
            step=step,
        )
    return Tangents(theta, states, statistics_tangents)


def changes(gradients: Tensor, of_statistics: dict[str, Tensor], tangents: Tangents) -> Tensor:
    """Return how measurements change ``(runs, queries, removals)``, from their derivatives and those of the models.

    Args:
        gradients: Of the measurements, by parameters ``(runs, queries, P)``.
        of_statistics: Of the measurements, by running statistics, each ``(runs, queries, ...)``.
        tangents: Of parameters and running statistics.
    """
    total = gradients @ tangents.theta.mT
    for name, cotangent in of_statistics.items():
        total = total + cotangent.flatten(2) @ tangents.statistics[name].flatten(2).mT
    return total
