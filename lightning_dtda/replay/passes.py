"""One pass of a micro-batch through the module, differentiated by parameters and by example weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor
from torch.autograd import grad

from lightning_dtda.compatibility import shapes_out_of
from lightning_dtda.replay.cut import CutTensor, changed_at, derivative, nodes_behind, weighed, zeros
from lightning_dtda.replay.outputs import Outputs

Gradients: TypeAlias = tuple[Tensor | None, ...]
"""What a node of autograd's graph is given, or returns."""

_PIECEWISE_LINEAR = frozenset(
    f"{name}Backward0"
    for name in (
        "Relu",
        "LeakyRelu",
        "Threshold",
        "Hardtanh",
        "Hardshrink",
        "Softshrink",
        "MaxPool2DWithIndices",
        "MaxPool3DWithIndices",
        "AdaptiveMaxPool2D",
        "AdaptiveMaxPool3D",
        "AvgPool2D",
        "AvgPool3D",
        "AdaptiveAvgPool2D",
        "AdaptiveAvgPool3D",
    )
)
"""Nodes of autograd's graph whose derivative does not change with what they are applied to."""

_LARGE = 2**14
"""Values of a layer from which on zeros for them are left out: for fewer, Python takes longer to than they do."""


class Pass:
    r"""A forward pass whose graph is kept, and a backward pass that includes the example weights.

    With the loss L of the batch, the tensors z at which the weights act, and running statistics
    :math:`\sigma' = F(\sigma, \theta)`, the gradient is

    .. math:: g(\theta, w) = \sum_z J_z^\top \left(w \odot \frac{\partial L}{\partial z}\right) .

    All derivatives use reverse mode. The derivative of g along v is a backward pass through the backward pass:

    .. math:: H v = \frac{\partial}{\partial \theta} \langle g, v \rangle, \qquad
        d_n = \frac{\partial}{\partial w_n} \langle g, v \rangle .

    Args:
        loss: Loss L with its graph.
        cut: Tensors z.
        parameters: Parameters :math:`\theta` in the order of the layout.
        weights: Example weights w ``(B,)``, with respect to which the gradient is differentiated.
        before: Running statistics before the pass by name, as leaves of the graph.
        after: Running statistics after the pass by name.
        create_graph: Whether the gradient will be differentiated.
    """

    def __init__(
        self,
        loss: Tensor,
        cut: Sequence[CutTensor],
        parameters: Sequence[Tensor],
        weights: Tensor,
        before: Mapping[str, Tensor],
        after: Mapping[str, Tensor],
        create_graph: bool = True,
    ) -> None:
        self.loss = loss
        self._cut = cut
        self._parameters = list(parameters)
        self._weights = weights
        self._before = before
        self._after = after
        if create_graph:
            _leave_zeros_out(loss)
        with weighed(cut, weights):
            self._found = grad(loss, self._parameters, create_graph=create_graph, allow_unused=True)
        self.gradient = [zeros(one, part) for one, part in zip(self._found, parameters, strict=True)]
        """Gradient g, one tensor for each parameter."""
        self.statistics = {name: tensor.detach() for name, tensor in after.items()}
        """Running statistics after the pass."""

    def products(
        self, direction: Sequence[Tensor], cotangents: Mapping[str, Tensor] | None = None, is_last: bool = False
    ) -> tuple[list[Tensor], Tensor, dict[str, Tensor]]:
        r"""Differentiate g along a direction v, and pull back the cotangents :math:`\mu` of the running statistics.

        Args:
            direction: Direction v, one tensor for each parameter.
            cotangents: Cotangents :math:`\mu` by name; zero if not given.
            is_last: Whether this is the last use of the pass, so that its graph can be freed along the way.

        Returns:
            :math:`H v + \nabla_\theta \langle \mu, F \rangle`, one tensor for each parameter; the terms d of the
            examples ``(B,)``; and the cotangents of the statistics before the pass.
        """
        cotangents = cotangents or {}
        outputs = [*self._found, *(self._after[name] for name in cotangents)]
        inputs = [*self._parameters, self._weights, *(self._before[name] for name in cotangents)]
        found = derivative(outputs, [*direction, *cotangents.values()], inputs, retain_graph=not is_last)
        size = len(self._parameters)
        return found[:size], found[size], dict(zip(cotangents, found[size + 1 :], strict=True))

    def terms(self, direction: Sequence[Tensor]) -> Tensor:
        """Return only the terms d of the examples ``(B,)`` for a direction, at a lower cost than :meth:`products`."""
        return derivative(self._found, direction, [self._weights])[0]

    def share_of(self, example: int) -> list[Tensor]:
        """Return the contribution to the gradient of the example at a position in the batch."""
        chosen = torch.zeros_like(self._weights)
        chosen[example] = 1
        return self.weighted(chosen)

    def weighted(self, weights: Tensor, create_graph: bool = False) -> list[Tensor]:
        """Return the gradient with other example weights ``(B,)``."""
        with weighed(self._cut, weights):
            found = grad(self.loss, self._parameters, retain_graph=True, create_graph=create_graph, allow_unused=True)
        return [zeros(one, like) for one, like in zip(found, self._parameters, strict=True)]

    @cached_property
    def beyond(self) -> list[Tensor] | None:
        """Gradient with all example weights zero, e.g. that of a penalty, with its graph; ``None`` if it is zero."""
        found = self.weighted(torch.zeros_like(self._weights), create_graph=True)
        return found if any(bool(part.detach().any()) for part in found) else None

    def curve_beyond(self, direction: Sequence[Tensor]) -> list[Tensor]:
        """Return the derivative of :attr:`beyond` along a direction in parameter space: its Hessian-vector product."""
        return derivative(self.beyond or [None] * len(direction), direction, self._parameters)

    def arrived(self) -> list[Tensor]:
        """Return the gradients that arrive at the tensors z, examples first ``(B, ...)``."""
        found: dict[int, Tensor] = {}

        def look(number: int, tensor: CutTensor, gradient: Tensor) -> Tensor:
            rows = gradient.detach().movedim(tensor.rows.axis, 0)
            found[number] = tensor.rows.of_examples(rows, len(self._weights))
            return gradient

        with changed_at(self._cut, look):
            grad(self.loss, self._parameters, retain_graph=True, allow_unused=True)
        return [found[number] for number in sorted(found)]

    @cached_property
    def outputs(self) -> Outputs:
        """The network's outputs, and the loss as a function of them."""
        return Outputs(self.loss, self._cut, self._parameters)

    def statistics_along(self, direction: Sequence[Tensor], before: Mapping[str, Tensor]) -> dict[str, Tensor]:
        r"""Return the tangents :math:`\dot\sigma'` of the running statistics after the pass.

        Args:
            direction: Tangents of the parameters, one tensor for each.
            before: Tangents of the statistics before the pass, by name.
        """
        names = list(before)
        # forward mode by two reverse passes: the pull-back is linear in its cotangents
        cotangents = [torch.zeros_like(self._after[name], requires_grad=True) for name in names]
        inputs = [*self._parameters, *(self._before[name] for name in names)]
        pulled = grad([self._after[name] for name in names], inputs, cotangents, create_graph=True, allow_unused=True)
        found = derivative(pulled, [*direction, *before.values()], cotangents, retain_graph=False)
        return dict(zip(names, found, strict=True))


def _leave_zeros_out(loss: Tensor) -> None:
    """Have second derivatives of a loss do without the zeros that autograd makes for piecewise linear layers.

    Each has as many as values, and all wait until the forward pass is pulled back: a tenth of a ViT's memory.
    """
    for node in nodes_behind([loss]):
        if node.name() in _PIECEWISE_LINEAR and math.prod(shapes_out_of(node)[0]) >= _LARGE:
            node.register_hook(_differentiated)


def _differentiated(found: Gradients, _arrived: Gradients) -> None:
    node = None if found[0] is None else found[0].grad_fn
    if node is not None and node.name().endswith("BackwardBackward0"):
        node.register_hook(_pulled_back)


def _pulled_back(found: Gradients, _arrived: Gradients) -> Gradients:
    """Return the gradient by what arrived, and none by the values of the layer."""
    return found[0], None
