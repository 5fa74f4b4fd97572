"""Forward mode: derivatives of a training's state by example weights, carried through its steps."""

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
        theta: Tangents of the parameters, the responses :math:`r_k` ``(runs, removals, P)``.
        states: Tangents of each group's optimizer state.
        statistics: Tangents of BatchNorm's running statistics, each ``(runs, removals, ...)``.
    """

    theta: Tensor
    states: list[State]
    statistics: dict[str, Tensor]

    @classmethod
    def zeros(cls, theta: Tensor, states: Sequence[State], statistics: dict[str, Tensor], removals: int) -> Tangents:
        """Return the tangents before the first step, all zero, for a state whose parts are ``(runs, ...)``."""

        def zeros(part: Tensor) -> Tensor:
            return part.new_zeros(len(part), removals, *part.shape[1:])

        return cls(
            zeros(theta),
            [{key: zeros(part) for key, part in state.items()} for state in states],
            {name: zeros(part) for name, part in statistics.items()},
        )


@dataclass(frozen=True)
class Position:
    """The current position of a forward sweep.

    Args:
        step: Number of steps taken t.
        theta: Parameters ``(runs, P)``.
        states: Optimizer state of each group.
        buffers: Buffers and frozen parameters by name, each ``(runs, ...)``.
        tangents: Tangents of the parameters, states and running statistics.
    """

    step: int
    theta: Tensor
    states: list[State]
    buffers: dict[str, Tensor]
    tangents: Tangents


class GradientTangents(NamedTuple):
    r"""A step's gradient, and the tangents of the gradient and the running statistics along removals.

    Args:
        gradient: Gradient g ``(runs, P)``.
        buffers: Buffers that the step updates, after the step.
        of_gradient: Tangents of the gradient :math:`\dot g` ``(runs, removals, P)``.
        of_statistics: Tangents of the running statistics after the step, each ``(runs, removals, ...)``.
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

    This holds since g is affine in the weights, and its Jacobian by the parameters is symmetric if all weights are one.

    Args:
        way: Implementation that runs the step.
        batch: Batch of the step.
        theta: Parameters ``(runs, P)``.
        buffers: Buffers and frozen parameters, each ``(runs, ...)``.
        removed: 1 where an example of the batch is in a removal, else 0 ``(runs, removals, B)``.
        tangents: Tangents of parameters and running statistics before the step.
        updates: Whether the step changes buffers.
    """
    no_cotangents = {name: torch.zeros_like(part) for name, part in tangents.statistics.items()}
    found = way.products(batch, theta, buffers, tangents.theta, no_cotangents)
    of_gradient = found.products
    for removal in range(removed.shape[1]):
        if bool(removed[:, removal].any()):  # most steps do not contain a given example
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
        update: Update of the optimizer.
        clipping: Gradient clipping of the Trainer.
        hyperparameters: Hyperparameters of each group; tensors broadcast against ``(runs, removals, P)``.
        step: Step t.
        point: Starting point of the step.
        tangents: Tangents before the step.
        of_step: Tangents of the gradient of the step's loss, and of the running statistics after the step.

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
    """Return the changes of measurements along removals ``(runs, queries, removals)`` by the chain rule.

    Args:
        gradients: Derivatives of the measurements by parameters ``(runs, queries, P)``.
        of_statistics: Derivatives of the measurements by running statistics, each ``(runs, queries, ...)``.
        tangents: Tangents of parameters and running statistics.
    """
    total = gradients @ tangents.theta.mT
    for name, cotangent in of_statistics.items():
        total = total + cotangent.flatten(2) @ tangents.statistics[name].flatten(2).mT
    return total
