r"""Gradients of single examples' losses by the weights of layers, from one backward pass of a batch.

With inputs :math:`a_{nt}` at the positions t of an example and derivatives :math:`d_{nt}` of the loss by the outputs,
the gradient by a linear layer's weight is :math:`\sum_t d_{nt} a_{nt}^\top`. A convolution is a linear layer on patches
(Goodfellow, arXiv 1510.01799; Rochette et al., arXiv 1912.06015), the weight of a normalisation layer multiplies its
normalised inputs, and an embedding is a linear layer on one-hot vectors. Nothing is differentiated twice, and for
examples with one position the gradient is not even formed:
:math:`\langle d_n a_n^\top, V \rangle = d_n^\top V a_n`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional

from lightning_dtda.compatibility import padding_of
from lightning_dtda.trajectory import ParameterLayout

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_KINDS = frozenset({nn.Linear, nn.Embedding, nn.LayerNorm, nn.GroupNorm, *CONVOLUTIONS, *_BATCH_NORMS})
"""Supported layer classes. Subclasses are not supported, because they may compute anything."""

_NEGLIGIBLE = 16
"""Units in the last place of an example's whole gradient; a parameter's gradient below that is rounding. For example,
the gradient by the bias of the keys in attention is zero."""


class OtherWayError(Exception):
    """A batch called the layers differently from the batch used in ``LayerGradients.learn``."""


@dataclass(frozen=True)
class WatchedLayer:
    """A layer and the places of its trained parameters; ``None`` for a parameter that is missing or not known."""

    module: nn.Module
    weight: slice | None
    bias: slice | None

    @property
    def has_matrix(self) -> bool:
        """Whether its weight is a matrix that multiplies the inputs."""
        return isinstance(self.module, (nn.Linear, nn.Embedding, *CONVOLUTIONS))


class Call(NamedTuple):
    """A call of a layer: its inputs ``(B, ...)``, and the place of its result in the autograd graph."""

    layer: int
    inputs: Tensor
    result: GradientEdge


class LayerGradients:
    """The layers of a module for which gradients of single examples are known.

    Args:
        module: The module.
        layout: Layout of its trained parameters.
    """

    def __init__(self, module: nn.Module, layout: ParameterLayout) -> None:
        starts = [0, *accumulate(layout.sizes)]
        by_name = dict(module.named_parameters())
        places = {id(by_name[name]): slice(starts[n], starts[n + 1]) for n, name in enumerate(layout.names)}
        self._places = list(places.values())
        found = [
            WatchedLayer(one, *(places.get(id(getattr(one, name, None))) for name in ("weight", "bias")))
            for one in module.modules()
            if type(one) in _KINDS
            and not getattr(one, "scale_grad_by_freq", False)
            and not getattr(one, "max_norm", None)
        ]
        self.layers = [layer for layer in found if layer.weight is not None or layer.bias is not None]
        self._is_learned = False
        self.times: Counter[int] = Counter()
        """Number of calls of each layer, by the layer's number."""
        self.spread: set[int] = set()
        """Numbers of embeddings that are called once for all examples."""
        self.others = list(range(len(self._places)))
        """Numbers of the parameters whose gradients are not known."""

    @contextmanager
    def watched(self, examples: int) -> Iterator[list[Call | None]]:
        """Record calls of the layers in a forward pass of B examples; ``None`` for a call without an axis over them.

        In this context, an embedding that is called once for all examples (position embeddings) is called for each.
        """
        calls: list[Call | None] = []

        def spread(number: int, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            rows = args[0]
            if not self._is_learned and len(rows) != examples:
                self.spread.add(number)
            if number not in self.spread:
                return None
            rows = rows[0] if rows.ndim > 1 and len(rows) == 1 else rows
            return (rows.expand(examples, *rows.shape), *args[1:])

        def note(number: int, _module: nn.Module, args: tuple[Any, ...], result: Tensor) -> None:
            is_known = bool(args) and all(one.ndim > 1 and len(one) == examples for one in (args[0], result))
            if isinstance(self.layers[number].module, nn.Embedding):
                is_known = bool(args) and len(args[0]) == examples
            # take its place in the graph now: later operations may change the result in place
            is_known = is_known and result.requires_grad
            calls.append(Call(number, args[0].detach(), get_gradient_edge(result)) if is_known else None)

        with ExitStack() as hooks:
            for number, layer in enumerate(self.layers):
                if isinstance(layer.module, nn.Embedding):
                    hooks.enter_context(layer.module.register_forward_pre_hook(partial(spread, number)))
                hooks.enter_context(layer.module.register_forward_hook(partial(note, number)))
            yield calls

    @property
    def places_of_others(self) -> list[slice]:
        """Places of the parameters whose gradients are not known."""
        return [self._places[number] for number in self.others]

    @property
    def is_empty(self) -> bool:
        """Whether no gradients are known."""
        return len(self.others) == len(self._places)

    def learn(self, loss: Tensor, calls: list[Call | None], shares: Tensor) -> None:
        """Determine which gradients are known, by comparison with the given gradients of a batch.

        Gradients differ if a weight is also used elsewhere, if examples lie along another axis, or if they mix in the
        network.

        Args:
            loss: Loss of the batch.
            calls: Calls recorded by :meth:`watched`.
            shares: Contributions of the batch's first examples to its gradient ``(n, P)``.
        """
        found = torch.zeros_like(shares)
        self.add_gradients(loss, calls, found, torch.arange(len(shares)))
        rounding = _NEGLIGIBLE * torch.finfo(shares.dtype).eps * shares.norm(dim=1)
        tolerance = torch.finfo(shares.dtype).eps ** 0.5
        self.others = [
            number
            for number, place in enumerate(self._places)
            if bool(
                ((found - shares)[:, place].norm(dim=1) > tolerance * shares[:, place].norm(dim=1) + rounding).any()
            )
        ]
        unknown = {self._places[number].start for number in self.others}

        def if_known(place: slice | None) -> slice | None:
            return None if place is None or place.start in unknown else place

        self.layers = [
            replace(layer, weight=if_known(layer.weight), bias=if_known(layer.bias)) for layer in self.layers
        ]
        self.times = Counter(call.layer for call in self.checked(calls))
        self._is_learned = True

    def products(self, loss: Tensor, calls: list[Call | None], vectors: Tensor) -> Tensor:
        r"""Return :math:`\langle g_n, v \rangle` ``(Q, B)`` for ``vectors`` ``(Q, P)``, over the known parameters.

        Args:
            loss: Loss of the batch.
            calls: Calls recorded by :meth:`watched`.
            vectors: Vectors v.

        Raises:
            OtherWayError: If the layers were called differently from the batch used in :meth:`learn`.
        """
        return torch.stack([_products(*one, vectors) for one in self._differentiated(loss, calls)]).sum(0)

    def products_of(self, call: Call, derivatives: Tensor, vectors: Tensor) -> Tensor:
        """Return what a call of a layer adds to :meth:`products`, given the derivatives by its outputs."""
        return _products(self.layers[call.layer], call.inputs, derivatives, vectors)

    def add_gradients(
        self, loss: Tensor, calls: list[Call | None], total: Tensor, rows: Tensor, factor: float = 1.0
    ) -> None:
        """Add examples' gradients by the known parameters to ``total`` ``(n, P)``.

        Args:
            loss: Loss of the batch.
            calls: Calls recorded by :meth:`watched`.
            total: Tensor to add to.
            rows: Positions of n examples in the batch.
            factor: Factor of the gradients.

        Raises:
            OtherWayError: See :meth:`products`.
        """
        for layer, inputs, derivatives in self._differentiated(loss, calls):
            for place, of_examples in gradients(layer, inputs[rows], derivatives[rows]):
                total[:, place].add_(of_examples, alpha=factor)

    def checked(self, calls: list[Call | None]) -> list[Call]:
        """Return the calls of layers that have a parameter with known gradients.

        Raises:
            OtherWayError: See :meth:`products`.
        """
        layers = self.layers
        known = [call for call in calls if call and (layers[call.layer].weight or layers[call.layer].bias)]
        if self._is_learned and self.times != Counter(call.layer for call in known):
            raise OtherWayError
        return known

    def _differentiated(self, loss: Tensor, calls: list[Call | None]) -> Iterator[tuple[WatchedLayer, Tensor, Tensor]]:
        """Yield the layers that were called, their inputs, and the derivatives of the loss by their outputs."""
        known = self.checked(calls)
        found: list[Tensor | None] = list(
            torch.autograd.grad(loss, [call.result for call in known], allow_unused=True) if known else ()
        )
        for number, call in enumerate(known):
            derivatives, found[number] = found[number], None  # free it as soon as possible
            if derivatives is not None:
                yield self.layers[call.layer], call.inputs, derivatives


# -- functions of one layer


def _products(layer: WatchedLayer, inputs: Tensor, derivatives: Tensor, vectors: Tensor) -> Tensor:
    """Return the inner products of examples' gradients with vectors ``(Q, P)``, as ``(Q, B)``."""
    total = vectors.new_zeros(len(vectors), len(derivatives))
    if layer.weight is not None and _is_never_written(layer, derivatives, len(vectors)):
        matrices = vectors[:, layer.weight].unflatten(1, layer.module.weight.shape)
        if isinstance(layer.module, nn.Embedding):
            at_rows = without_padding(layer.module, inputs, derivatives)
            total += torch.stack([(matrix[inputs] * at_rows).flatten(1).sum(1) for matrix in matrices])
        else:
            moved = (inputs @ matrices.flatten(0, 1).T).unflatten(-1, matrices.shape[:2])
            total += torch.einsum("b...qo,b...o->qb", moved, derivatives)
        layer = replace(layer, weight=None)
    for place, of_examples in gradients(layer, inputs, derivatives):
        total.addmm_(vectors[:, place], of_examples.T.to(vectors))
    return total


def _is_never_written(layer: WatchedLayer, derivatives: Tensor, vectors: int) -> bool:
    """Whether forming an example's gradient by the weight costs more than its products with the vectors."""
    if isinstance(layer.module, nn.Embedding):
        return True
    positions = derivatives[0].numel() // derivatives.shape[-1]
    # with several positions, forming the gradient once serves all vectors
    return isinstance(layer.module, nn.Linear) and (positions - 1) * (vectors - 1) <= 1


def gradients(layer: WatchedLayer, inputs: Tensor, derivatives: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield the place of each of the layer's parameters, and examples' gradients by it ``(B, n)``."""
    module: Any = layer.module
    if layer.weight is not None:
        if isinstance(module, nn.Embedding):
            of_rows = derivatives.new_zeros(len(inputs), *module.weight.shape)
            places = inputs.flatten(1)[..., None].expand(-1, -1, of_rows.shape[2])
            of_rows.scatter_add_(1, places, without_padding(module, inputs, derivatives).reshape(places.shape))
            yield layer.weight, of_rows.flatten(1)
        elif isinstance(module, (nn.Linear, *CONVOLUTIONS)):
            entering, leaving = at_positions(module, inputs.to(derivatives.dtype), derivatives)
            yield layer.weight, (leaving @ entering.mT).flatten(1)
        else:
            yield layer.weight, _summed(module, derivatives * _normalised(module, inputs))
    if layer.bias is not None:
        yield layer.bias, _summed(module, derivatives)


def at_positions(module: Any, inputs: Tensor, derivatives: Tensor) -> tuple[Tensor, Tensor]:
    """Return the inputs at each position ``(B, groups, d_in, T)``, and the derivatives ``(B, groups, d_out, T)``."""
    if isinstance(module, nn.Linear):
        return (
            inputs.reshape(len(inputs), 1, -1, inputs.shape[-1]).mT,
            derivatives.reshape(len(inputs), 1, -1, derivatives.shape[-1]).mT,
        )
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    windows = functional.pad(inputs, padding_of(module), mode)
    for axis, (size, stride, dilation) in enumerate(
        zip(module.kernel_size, module.stride, module.dilation, strict=True), start=2
    ):
        windows = windows.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
    # (B, channels, *positions, *kernel): move the kernel's axes next to the channels
    dimensions = len(module.kernel_size)
    order = (0, 1, *range(2 + dimensions, 2 + 2 * dimensions), *range(2, 2 + dimensions))
    patches = windows.permute(order).flatten(2, 1 + dimensions).flatten(3)
    leaving = derivatives.flatten(2).unflatten(1, (module.groups, -1))
    return patches.unflatten(1, (module.groups, -1)).flatten(2, 3), leaving


def _normalised(module: Any, inputs: Tensor) -> Tensor:
    """Return the normalised inputs, which a normalisation layer multiplies with its weight."""
    if isinstance(module, nn.LayerNorm):
        return functional.layer_norm(inputs, module.normalized_shape, eps=module.eps)
    if isinstance(module, nn.GroupNorm):
        return functional.group_norm(inputs, module.num_groups, eps=module.eps)
    return functional.batch_norm(
        inputs, module.running_mean, module.running_var, training=module.running_mean is None, eps=module.eps
    )


def _summed(module: Any, derivatives: Tensor) -> Tensor:
    """Sum over positions, to ``(B, n)``: features are the last axes, or channels the second axis."""
    if isinstance(module, (nn.Linear, nn.LayerNorm)):
        features = module.bias.numel() if module.bias is not None else module.weight.numel()
        return derivatives.reshape(len(derivatives), -1, features).sum(1)
    return derivatives.flatten(2).sum(2) if derivatives.ndim > 2 else derivatives


def without_padding(module: nn.Embedding, rows: Tensor, derivatives: Tensor) -> Tensor:
    """Return derivatives by the outputs of an embedding, with zeros for its padding index."""
    return derivatives if module.padding_idx is None else derivatives * rows.ne(module.padding_idx)[..., None]
