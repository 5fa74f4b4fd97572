r"""Gradients of single examples' losses by the weights of layers, from one backward pass of a whole batch.

By a linear layer's weight, with its inputs :math:`a_{nt}` at the positions t of an example and the derivatives
:math:`d_{nt}` of the loss by its outputs, it is :math:`\sum_t d_{nt} a_{nt}^\top`; a convolution is such a layer of the
patches that it looks at (Goodfellow, arXiv 1510.01799; Rochette et al., arXiv 1912.06015). Norms multiply what they
have normalised, and embeddings rows of the unit matrix. Nothing is differentiated twice, and of an example with one
position the gradient is not even written out: :math:`\langle d_n a_n^\top, V \rangle = d_n^\top V a_n`.
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
"""Layers that are known; what is derived from them may do anything, and is none."""

_NEGLIGIBLE = 16
"""Units in the last place of an example's whole gradient, below which a parameter's is rounding: the biases of keys in
attention have none."""


class OtherWayError(Exception):
    """A batch went another way through the layers than the one that they were learned from."""


@dataclass(frozen=True)
class WatchedLayer:
    """A layer, and where its trained parameters lie among all; ``None`` for what is not there, or not known."""

    module: nn.Module
    weight: slice | None
    bias: slice | None

    @property
    def has_matrix(self) -> bool:
        """Whether its weight is a matrix that is multiplied with what enters."""
        return isinstance(self.module, (nn.Linear, nn.Embedding, *CONVOLUTIONS))


class Call(NamedTuple):
    """What went into a layer ``(B, ...)``, and where its result stands in the graph."""

    layer: int
    inputs: Tensor
    result: GradientEdge


class LayerGradients:
    """The layers of a module, by whose weights single examples' gradients are known.

    Args:
        module: The module.
        layout: Its trained parameters.
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
        """How often each layer is called, by its number."""
        self.spread: set[int] = set()
        """Numbers of embeddings that look something up once for all examples."""
        self.others = list(range(len(self._places)))
        """Numbers of the parameters by which nothing is known."""

    @contextmanager
    def watched(self, examples: int) -> Iterator[list[Call | None]]:
        """Note the calls of the layers in a forward pass of B examples; ``None`` for a call without an axis over them.

        What an embedding looks up once for all examples (positions), it looks up for each of them inside.
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
            # its place in the graph as it is now: what follows may change the result itself
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
        """Where the parameters lie by which nothing is known."""
        return [self._places[number] for number in self.others]

    @property
    def is_empty(self) -> bool:
        """Whether no gradient is known."""
        return len(self.others) == len(self._places)

    def learn(self, loss: Tensor, calls: list[Call | None], shares: Tensor) -> None:
        """See which gradients are known, from a batch of which they are given.

        A weight may be used elsewhere too, examples may lie along another axis, or mix in the network.

        Args:
            loss: Of the batch.
            calls: As :meth:`watched` noted them.
            shares: What its first examples contribute to its gradient ``(n, P)``.
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
        r"""Return :math:`\langle g_n, v \rangle` ``(Q, B)`` of a batch for ``vectors`` ``(Q, P)``, by what is known.

        Args:
            loss: Of the batch.
            calls: As :meth:`watched` noted them.
            vectors: v.

        Raises:
            OtherWayError: If the layers were not called as in the batch that they were learned from.
        """
        return torch.stack([_products(*one, vectors) for one in self._differentiated(loss, calls)]).sum(0)

    def products_of(self, call: Call, derivatives: Tensor, vectors: Tensor) -> Tensor:
        """Return what a call of a layer adds to :meth:`products`, given the derivatives by what came out of it."""
        return _products(self.layers[call.layer], call.inputs, derivatives, vectors)

    def add_gradients(
        self, loss: Tensor, calls: list[Call | None], total: Tensor, rows: Tensor, factor: float = 1.0
    ) -> None:
        """Add examples' gradients, by what is known, to ``total`` ``(n, P)``.

        Args:
            loss: Of the batch.
            calls: As :meth:`watched` noted them.
            total: What is added to.
            rows: Which examples of the batch, n.
            factor: What they are multiplied with.

        Raises:
            OtherWayError: As :meth:`products`.
        """
        for layer, inputs, derivatives in self._differentiated(loss, calls):
            for place, of_examples in gradients(layer, inputs[rows], derivatives[rows]):
                total[:, place].add_(of_examples, alpha=factor)

    def checked(self, calls: list[Call | None]) -> list[Call]:
        """Return the calls of layers with a parameter by which gradients are known.

        Raises:
            OtherWayError: As :meth:`products`.
        """
        layers = self.layers
        known = [call for call in calls if call and (layers[call.layer].weight or layers[call.layer].bias)]
        if self._is_learned and self.times != Counter(call.layer for call in known):
            raise OtherWayError
        return known

    def _differentiated(self, loss: Tensor, calls: list[Call | None]) -> Iterator[tuple[WatchedLayer, Tensor, Tensor]]:
        """Yield the layers that were called, what went in, and the loss's derivatives by what came out."""
        known = self.checked(calls)
        found: list[Tensor | None] = list(
            torch.autograd.grad(loss, [call.result for call in known], allow_unused=True) if known else ()
        )
        for number, call in enumerate(known):
            derivatives, found[number] = found[number], None  # kept no longer than it is needed
            if derivatives is not None:
                yield self.layers[call.layer], call.inputs, derivatives


# -- of one layer


def _products(layer: WatchedLayer, inputs: Tensor, derivatives: Tensor, vectors: Tensor) -> Tensor:
    """Return the products of examples' gradients with vectors ``(Q, P)``, as ``(Q, B)``."""
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
    """Whether an example's gradient by the weight takes more to write out than its products with vectors."""
    if isinstance(layer.module, nn.Embedding):
        return True
    positions = derivatives[0].numel() // derivatives.shape[-1]
    # of several positions, one that is written out serves all vectors
    return isinstance(layer.module, nn.Linear) and (positions - 1) * (vectors - 1) <= 1


def gradients(layer: WatchedLayer, inputs: Tensor, derivatives: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield where the layer's parameters lie, and examples' gradients by them ``(B, n)``."""
    module: Any = layer.module
    if layer.weight is not None:
        if isinstance(module, nn.Embedding):
            of_rows = derivatives.new_zeros(len(inputs), *module.weight.shape)
            places = inputs.flatten(1)[..., None].expand(-1, -1, of_rows.shape[2])
            of_rows.scatter_add_(1, places, without_padding(module, inputs, derivatives).reshape(places.shape))
            yield layer.weight, of_rows.flatten(1)
        elif isinstance(module, (nn.Linear, *CONVOLUTIONS)):
            entering, leaving = positions(module, inputs.to(derivatives.dtype), derivatives)
            yield layer.weight, (leaving @ entering.mT).flatten(1)
        else:
            yield layer.weight, _summed(module, derivatives * _normalised(module, inputs))
    if layer.bias is not None:
        yield layer.bias, _summed(module, derivatives)


def positions(module: Any, inputs: Tensor, derivatives: Tensor) -> tuple[Tensor, Tensor]:
    """Return what enters at each position, ``(B, groups, d_in, T)``, and the derivatives ``(B, groups, d_out, T)``."""
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
    # (B, channels, *positions, *kernel): the kernel's places go with the channels
    dimensions = len(module.kernel_size)
    order = (0, 1, *range(2 + dimensions, 2 + 2 * dimensions), *range(2, 2 + dimensions))
    patches = windows.permute(order).flatten(2, 1 + dimensions).flatten(3)
    leaving = derivatives.flatten(2).unflatten(1, (module.groups, -1))
    return patches.unflatten(1, (module.groups, -1)).flatten(2, 3), leaving


def _normalised(module: Any, inputs: Tensor) -> Tensor:
    """Return what a norm multiplies with its weight."""
    if isinstance(module, nn.LayerNorm):
        return functional.layer_norm(inputs, module.normalized_shape, eps=module.eps)
    if isinstance(module, nn.GroupNorm):
        return functional.group_norm(inputs, module.num_groups, eps=module.eps)
    return functional.batch_norm(
        inputs, module.running_mean, module.running_var, training=module.running_mean is None, eps=module.eps
    )


def _summed(module: Any, derivatives: Tensor) -> Tensor:
    """Sum over positions: features are the last axes, or channels the second one ``(B, n)``."""
    if isinstance(module, (nn.Linear, nn.LayerNorm)):
        features = module.bias.numel() if module.bias is not None else module.weight.numel()
        return derivatives.reshape(len(derivatives), -1, features).sum(1)
    return derivatives.flatten(2).sum(2) if derivatives.ndim > 2 else derivatives


def without_padding(module: nn.Embedding, rows: Tensor, derivatives: Tensor) -> Tensor:
    """Return derivatives by what an embedding found, zero at its row of padding."""
    return derivatives if module.padding_idx is None else derivatives * rows.ne(module.padding_idx)[..., None]
