"""Linear layers whose gradients by the weight are outer products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import nn

from lightning_dtda.estimators.objective import Objective


@dataclass(frozen=True)
class Layer:
    """A layer that is called once per example, with a trained weight that is not shared.

    Args:
        name: Name in the module.
        weight: Place of the weight in the parameters.
        bias: Place of the bias, if it is trained.
        parameters: Names of both in the module.
        outputs: Size of the first dimension of the weight.
    """

    name: str
    weight: slice
    bias: slice | None
    parameters: tuple[str, ...]
    outputs: int


def layers_of(objective: Objective, kinds: Sequence[type[nn.Module]]) -> list[Layer]:
    """Find the layers of some classes, in the module's order.

    Args:
        objective: The objective, with the module and its trained parameters.
        kinds: Classes of layers. Subclasses are left out, because they may compute anything.
    """
    layout, module = objective.layout, objective.module
    starts = [0, *accumulate(layout.sizes)]
    places = {name: slice(starts[i], starts[i + 1]) for i, name in enumerate(layout.names)}
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    # shared parameters have several names; layers that are called twice are left out below
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
    r"""Find linear layers where the derivative of an output by the weight is an outer product, :math:`g_n a_n^\top`.

    These layers are called with one vector per example, and their weight is not used elsewhere (a decoder may use the
    transposed weight of its encoder). Such uses are detected in the derivatives of the first example.
    """
    if objective.scale is not None:
        return []  # scaling individual entries destroys the outer product
    candidates = layers_of(objective, (nn.Linear,))
    if not candidates:
        return []
    example = objective.root_rows(torch.arange(1), None, [layer.name for layer in candidates])
    tolerance = torch.finfo(objective.theta.dtype).eps ** 0.5
    found = []
    for layer, (derivatives, inputs) in zip(candidates, example.layers, strict=True):
        whole = example.rows[:, layer.weight]
        # an example with several positions has more derivatives and inputs than the weight has rows and columns
        if derivatives.shape[1] * inputs.shape[1] == whole.shape[1]:
            products = (derivatives[:, :, None] * inputs[:, None, :]).flatten(1)
            if bool((products - whole).norm() <= tolerance * whole.norm()):
                found.append(layer)
    return found
