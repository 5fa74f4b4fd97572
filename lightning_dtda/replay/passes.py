"""One pass of a micro-batch through the module, and its derivatives by parameters and by the weights of examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor
from torch.autograd import grad

from lightning_dtda.replay.cut import CutTensor, at_cut, weigh, zeros
from lightning_dtda.replay.outputs import Outputs


class Pass:
    r"""A forward pass whose graph is kept, and a backward pass with the weights of examples in it.

    With the loss L of the batch, the tensors z at which the weights act, and running statistics
    :math:`\sigma' = F(\sigma, \theta)`,

    .. math:: g(\theta, w) = \sum_z J_z^\top \left(w \odot \frac{\partial L}{\partial z}\right)

    is the gradient. All derivatives are by reverse mode: that of g along v by a backward pass of the backward pass,

    .. math:: H v = \frac{\partial}{\partial \theta} \langle g, v \rangle, \qquad
        d_n = \frac{\partial}{\partial w_n} \langle g, v \rangle .

    Args:
        loss: L, with its graph.
        cut: The tensors z.
        parameters: :math:`\theta`, in the layout's order.
        weights: w ``(B,)``, of which derivatives are taken.
        before: The running statistics before the pass by name, as leaves of the graph.
        after: Those after it.
        create_graph: Whether derivatives of the gradient will be asked for.
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
        handles = weigh(cut, weights)
        try:
            found = grad(loss, self._parameters, create_graph=create_graph, allow_unused=True)
        finally:
            for handle in handles:
                handle.remove()
        self._found = found
        self.gradient = [zeros(one, part) for one, part in zip(found, parameters, strict=True)]
        """g, one tensor for each parameter."""
        self.statistics = {name: tensor.detach() for name, tensor in after.items()}
        """Running statistics after the pass."""

    def products(
        self, direction: Sequence[Tensor], cotangents: Mapping[str, Tensor] | None = None, is_last: bool = False
    ) -> tuple[list[Tensor], Tensor, dict[str, Tensor]]:
        r"""Differentiate g along a direction v, and running statistics along their cotangents :math:`\mu`.

        Args:
            direction: v, one tensor for each parameter.
            cotangents: :math:`\mu`, by name; zero if not given.
            is_last: Whether nothing else is asked of the pass, whose graph is freed then on the way.

        Returns:
            :math:`H v + \nabla_\theta \langle \mu, F \rangle`, one tensor for each parameter; the examples' terms d
            ``(B,)``; and the cotangents of the statistics before the pass.
        """
        cotangents = cotangents or {}
        pairs = [
            (one, v) for one, v in zip(self._found, direction, strict=True) if one is not None and one.requires_grad
        ]
        pairs += [(self._after[name], cotangent) for name, cotangent in cotangents.items()]
        before = [self._before[name] for name in cotangents]
        inputs = [*self._parameters, self._weights, *before]
        if not pairs:
            return [torch.zeros_like(p) for p in self._parameters], torch.zeros_like(self._weights), {}
        outputs, along = zip(*pairs, strict=True)
        derivatives = grad(outputs, inputs, along, retain_graph=not is_last, allow_unused=True)
        found = [zeros(one, part) for one, part in zip(derivatives, inputs, strict=True)]
        size = len(self._parameters)
        return found[:size], found[size], dict(zip(cotangents, found[size + 1 :], strict=True))

    def terms(self, direction: Sequence[Tensor]) -> Tensor:
        """Return the examples' terms d ``(B,)`` for a direction alone, for less than :meth:`products`."""
        pairs = [
            (one, v) for one, v in zip(self._found, direction, strict=True) if one is not None and one.requires_grad
        ]
        if not pairs:
            return torch.zeros_like(self._weights)
        outputs, along = zip(*pairs, strict=True)
        return zeros(grad(outputs, self._weights, along, retain_graph=True, allow_unused=True)[0], self._weights)

    def share_of(self, example: int) -> list[Tensor]:
        """Return what one example, by its position, contributes to the gradient."""
        chosen = torch.zeros_like(self._weights)
        chosen[example] = 1
        return self.weighted(chosen)

    def weighted(self, weights: Tensor, create_graph: bool = False) -> list[Tensor]:
        """Return the gradient with other weights of the examples ``(B,)``."""
        handles = weigh(self._cut, weights)
        try:
            found = grad(self.loss, self._parameters, retain_graph=True, create_graph=create_graph, allow_unused=True)
        finally:
            for handle in handles:
                handle.remove()
        return [zeros(one, like) for one, like in zip(found, self._parameters, strict=True)]

    @cached_property
    def beyond(self) -> list[Tensor] | None:
        """The gradient that is left without any example: of a penalty, with its graph; ``None`` where there is none."""
        found = self.weighted(torch.zeros_like(self._weights), create_graph=True)
        return found if any(bool(part.detach().any()) for part in found) else None

    def curve_beyond(self, direction: Sequence[Tensor]) -> list[Tensor]:
        """Return the Hessian of what is left without any example, times a direction of the parameters."""
        pairs = [(one, v) for one, v in zip(self.beyond or [], direction, strict=False) if one.requires_grad]
        if not pairs:
            return [torch.zeros_like(v) for v in direction]
        outputs, along = zip(*pairs, strict=True)
        found = grad(outputs, self._parameters, along, retain_graph=True, allow_unused=True)
        return [zeros(one, like) for one, like in zip(found, self._parameters, strict=True)]

    def arrived(self) -> list[Tensor]:
        """Return the gradients that arrive at the tensors where weights act, examples first ``(B, ...)``."""
        found: dict[int, Tensor] = {}

        def look(number: int, tensor: CutTensor, gradient: Tensor) -> Tensor:
            rows = gradient.detach().movedim(tensor.rows.axis, 0)
            found[number] = tensor.rows.of_examples(rows, len(self._weights))
            return gradient

        handles = at_cut(self._cut, look)
        try:
            grad(self.loss, self._parameters, retain_graph=True, allow_unused=True)
        finally:
            for handle in handles:
                handle.remove()
        return [found[number] for number in sorted(found)]

    @cached_property
    def outputs(self) -> Outputs:
        """The network's outputs, and the loss as a function of them."""
        return Outputs(self.loss, self._cut, self._parameters)

    def statistics_along(self, direction: Sequence[Tensor], before: Mapping[str, Tensor]) -> dict[str, Tensor]:
        r"""Return :math:`\dot\sigma'`, how running statistics change along a direction of the parameters and their own.

        Args:
            direction: Of the parameters, one tensor for each.
            before: Tangents of the statistics before the pass, by name.
        """
        names = list(before)
        # a derivative forwards by two backwards: the pull-back is linear in its cotangents
        cotangents = [torch.zeros_like(self._after[name], requires_grad=True) for name in names]
        inputs = [*self._parameters, *(self._before[name] for name in names)]
        pulled = grad([self._after[name] for name in names], inputs, cotangents, create_graph=True, allow_unused=True)
        along = [*direction, *before.values()]
        pairs = [(one, v) for one, v in zip(pulled, along, strict=True) if one is not None and one.requires_grad]
        outputs, vectors = zip(*pairs, strict=True)
        found = grad(outputs, cotangents, vectors, allow_unused=True)
        return {name: zeros(one, like) for name, one, like in zip(names, found, cotangents, strict=True)}
