"""Layers whose weight has a structure of its own in every derivative: the gradient by it is an outer product."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import nn

from lightning_dtda.estimators.objective import Objective


@dataclass(frozen=True)
class Layer:
    """A layer with a trained weight of its own, called once for an example.

    Args:
        name: In the module.
        weight: Where the weight lies in the parameters.
        bias: Where the bias lies, if it is trained.
        parameters: Names of both in the module.
        outputs: The first dimension of the weight.
    """

    name: str
    weight: slice
    bias: slice | None
    parameters: tuple[str, ...]
    outputs: int


def layers_of(objective: Objective, kinds: Sequence[type[nn.Module]]) -> list[Layer]:
    """Find the layers of some kinds, in the module's order.

    Args:
        objective: Names the trained parameters, and runs the module.
        kinds: Classes; what is derived from them may do anything, and is left out.
    """
    layout, module = objective.layout, objective.module
    starts = [0, *accumulate(layout.sizes)]
    places = {name: slice(starts[i], starts[i + 1]) for i, name in enumerate(layout.names)}
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    # those that layers share have several names; a layer that is called twice has factors of neither call
    own = {found: of_one[0] for found, of_one in names.items() if len(of_one) == 1 and of_one[0] in places}
    layers = []
    for name, layer in module.named_modules():
        if type(layer) not in kinds or id(layer.weight) not in own:
            continue
        has_bias = getattr(layer, "bias", None) is not None
        bias = own.get(id(layer.bias)) if has_bias else None
        parameters = (own[id(layer.weight)], *([] if bias is None else [bias]))
        layers.append(
            Layer(name, places[parameters[0]], None if bias is None else places[bias], parameters, len(layer.weight))
        )
    calls = objective.calls([layer.name for layer in layers])
    return [layer for layer in layers if len(calls[layer.name]) == 1]


def outer_products(objective: Objective) -> list[Layer]:
    r"""Find the linear layers by whose weight an output's derivative is an outer product, :math:`g_n a_n^\top`.

    Those are called with one vector for an example, and their weight is used nowhere else. Whether it is (a decoder
    with the transposed weight of its encoder would), is seen from the first example's derivatives.
    """
    if objective.scale is not None:
        return []  # what is scaled entry by entry is no outer product any more
    candidates = layers_of(objective, (nn.Linear,))
    if not candidates:
        return []
    example = objective.root_rows(torch.arange(1), None, [layer.name for layer in candidates])
    tolerance = torch.finfo(objective.theta.dtype).eps ** 0.5
    found = []
    for layer, (derivatives, inputs) in zip(candidates, example.layers, strict=True):
        whole = example.rows[:, layer.weight]
        # of an example with several positions, there are more derivatives and inputs than rows and columns
        if derivatives.shape[1] * inputs.shape[1] == whole.shape[1]:
            products = (derivatives[:, :, None] * inputs[:, None, :]).flatten(1)
            if bool((products - whole).norm() <= tolerance * whole.norm()):
                found.append(layer)
    return found
