"""Forward mode: how the state of a training changes with the weights of examples, carried through its steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_dtda.optimizers import Clipping, GroupedUpdate, Hyperparameters, State
from lightning_dtda.replay.eager import Eager
from lightning_dtda.replay.steps import ByName, Point, StepBatch


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


class GradientTangents(NamedTuple):
    r"""A step's gradient, and how it and the running statistics change with removals.

    Args:
        gradient: g ``(runs, P)``.
        buffers: Those that the step updates, after it.
        of_gradient: :math:`\dot g` ``(runs, removals, P)``.
        of_statistics: Of the running statistics after the step, each ``(runs, removals, ...)``.
    """

    gradient: Tensor
    buffers: dict[str, Tensor]
    of_gradient: Tensor
    of_statistics: dict[str, Tensor]


def gradient_tangents(
    way: Eager, batch: StepBatch, theta: Tensor, buffers: ByName, removed: Tensor, tangents: Tangents, updates: bool
) -> GradientTangents:
    r"""Differentiate a step's gradient along its parameters and the weights of its examples.

    .. math:: \dot g_k = H r_k - \left(g(\theta, 1) - g(\theta, w^k)\right), \qquad
        w^k_n = 0 \text{ for } n \in S_k, \text{ else } 1

    since g is affine in the weights, and its derivative by the parameters symmetric where all weights are one.

    Args:
        way: Runs the step.
        batch: The step.
        theta: Parameters ``(runs, P)``.
        buffers: Each ``(runs, ...)``.
        removed: 1 where an example of the batch is in a removal ``(runs, removals, B)``.
        tangents: Of parameters and running statistics before the step.
        updates: Whether a step changes buffers.
    """
    no_cotangents = {name: torch.zeros_like(part) for name, part in tangents.statistics.items()}
    found = way.products(batch, theta, buffers, tangents.theta, no_cotangents)
    of_gradient = found.products
    for removal in range(removed.shape[1]):
        if bool(removed[:, removal].any()):  # most steps have none of an example
            without = way.gradient(batch, theta, buffers, 1 - removed[:, removal])[0]
            of_gradient[:, removal] -= found.gradient - without
    after = way.gradient(batch, theta, buffers)[1] if updates else {}
    of_statistics = way.statistics_along(batch, theta, buffers, tangents.theta, tangents.statistics)
    return GradientTangents(found.gradient, after, of_gradient, of_statistics)


def push(
    update: GroupedUpdate,
    clipping: Clipping,
    hyperparameters: Sequence[Hyperparameters],
    step: int,
    point: Point,
    tangents: Tangents,
    of_step: GradientTangents,
) -> Tangents:
    """Push tangents through clipping and the optimizer's update.

    Args:
        update: The optimizer's.
        clipping: The Trainer's.
        hyperparameters: Of each group; tensors broadcast against ``(runs, removals, P)``.
        step: t.
        point: What the step starts from.
        tangents: Before the step.
        of_step: Those of the gradient of the step's loss, and of the running statistics after it.

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
            clipping.tangent(point.unclipped.unsqueeze(1), of_step.of_gradient),
            step=step,
        )
    return Tangents(theta, states, of_step.of_statistics)


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
