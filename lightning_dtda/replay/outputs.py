r"""The loss as a function of the network's outputs: the two parts that the Gauss-Newton matrix is made of.

The outputs are the tensors at which the last parameters act, on each path from the loss back to the parameters: what is
between them and the loss is a function without parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import grad

from lightning_dtda.compatibility import shapes_out_of
from lightning_dtda.replay.cut import CutTensor, Edge, Rows, changed_at, derivative, edges_of, walk, zeros

_OF_PARAMETERS = frozenset(
    {
        "T",
        "Transpose",
        "Permute",
        "View",
        "UnsafeView",
        "Reshape",
        "ReshapeAlias",
        "Expand",
        "Squeeze",
        "Unsqueeze",
        "Slice",
        "Select",
        "Clone",
        "ToCopy",
        "Alias",
        "Mul",
        "Div",
        "Add",
        "Sub",
        "Neg",
        "Pow",
        "Exp",
        "Log",
        "Sqrt",
        "Rsqrt",
        "Sigmoid",
        "Softplus",
        "Tanh",
        "Norm",
        "LinalgVectorNorm",
        "WeightNormInterface",
        "Sum",
    }
)
"""Operations by which a layer's weight is made of its parameters: views, casts, weight normalisation. A lookup in a
table of embeddings is none: it is a layer."""


class Outputs:
    r"""The outputs z of a pass, and derivatives of both parts, :math:`L = \ell(z(\theta))`.

    Args:
        loss: L, with its graph.
        cut: The tensors at which the weights of examples act.
        parameters: :math:`\theta`, in the layout's order.
        last_parametrised: Whether to go on from the cut to where the last parameters act.
    """

    def __init__(
        self, loss: Tensor, cut: Sequence[CutTensor], parameters: Sequence[Tensor], last_parametrised: bool = True
    ) -> None:
        self._loss = loss
        self._parameters = list(parameters)
        self.tensors = _last_parametrised(cut) if last_parametrised else list(cut)
        self.shapes = [shapes_out_of(tensor.node)[tensor.output] for tensor in self.tensors]
        """Of each tensor of outputs."""
        self._arrived: list[Tensor] | None = None

    def gradient(self) -> list[Tensor]:
        """Return the loss's derivatives by the outputs, with a graph of their own."""
        if self._arrived is None:
            with self._cut_off():
                self._arrived = list(grad(self._loss, edges_of(self.tensors), create_graph=True))
        return self._arrived

    def _cut_off(self) -> AbstractContextManager[None]:
        """Stop gradients at the outputs: what is an output of the network is no input of the loss."""
        return changed_at(self.tensors, lambda number, tensor, gradient: torch.zeros_like(gradient))

    def curve(self, along: Sequence[Tensor]) -> list[Tensor]:
        r"""Return :math:`\nabla^2_z \ell\, u` for a direction u of the outputs."""
        pairs = [(one, u) for one, u in zip(self.gradient(), along, strict=True) if one.requires_grad]
        if not pairs:
            return [torch.zeros_like(u) for u in along]
        outputs, directions = zip(*pairs, strict=True)
        with self._cut_off():
            found = grad(outputs, edges_of(self.tensors), directions, retain_graph=True, allow_unused=True)
        return [zeros(one, u) for one, u in zip(found, along, strict=True)]

    def pull(
        self, along: Sequence[Tensor], by: Sequence[Tensor] | None = None, create_graph: bool = False
    ) -> list[Tensor]:
        r"""Return :math:`J^\top u` for a direction u of the outputs, by the parameters or by other tensors."""
        by = self._parameters if by is None else list(by)
        found = grad(
            edges_of(self.tensors), by, list(along), retain_graph=True, create_graph=create_graph, allow_unused=True
        )
        return [zeros(one, like) for one, like in zip(found, by, strict=True)]

    def push(self, direction: Sequence[Tensor]) -> list[Tensor]:
        r"""Return :math:`J v` for a direction v of the parameters."""
        along, pulled = self._pull_back
        return derivative(pulled, direction, along)

    @cached_property
    def _pull_back(self) -> tuple[list[Tensor], list[Tensor]]:
        """What is pulled back, and what comes of it, linear in the former."""
        along = [torch.zeros_like(one, requires_grad=True) for one in self.gradient()]
        return along, self.pull(along, create_graph=True)

    def hessian(self) -> Tensor:
        r"""Return :math:`\nabla^2_z \ell` ``(C, C)`` over all outputs, one tensor after the other."""
        like = self.gradient()
        units = torch.eye(sum(part.numel() for part in like), dtype=like[0].dtype, device=like[0].device)
        return torch.stack([torch.cat([part.reshape(-1) for part in self.curve(self.split(unit))]) for unit in units])

    def split(self, flat: Tensor) -> list[Tensor]:
        """Return a direction of all outputs ``(C,)`` as one tensor for each tensor of outputs."""
        sizes = [one.numel() for one in self.gradient()]
        return [
            part.reshape(one.shape).to(one.dtype) for part, one in zip(flat.split(sizes), self.gradient(), strict=True)
        ]


_PRODUCTS = frozenset({"AddmmBackward0", "MmBackward0"})
_VIEWS = frozenset({"ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0"})
"""A linear layer whose inputs have more than two dimensions returns a view of a product that has two."""


def _last_parametrised(cut: Sequence[CutTensor]) -> list[CutTensor]:
    """Walk on from the tensors at which weights act to those that a parameter made."""

    def look(edges: tuple[Edge, ...]) -> Rows | None:
        following = edges[0][0].next_functions
        return Rows(0) if any(other is not None and _is_parameter(other) for other, _ in following) else None

    return [_of_layer(found) for found in walk([((z.node, z.output),) for z in reversed(cut)], look)]


def _of_layer(tensor: CutTensor) -> CutTensor:
    """Return a tensor as its layer returns it, where that is a view of it and all else depends on the view."""
    user = tensor.users[0][0] if len(tensor.users) == 1 and tensor.node.name() in _PRODUCTS else None
    return CutTensor(user, 0, Rows(0)) if user is not None and user.name() in _VIEWS else tensor


def _is_parameter(node: Any) -> bool:
    """Whether a node is a parameter, or a parameter transposed, cast, or made of others by the number."""
    if node.name() == "torch::autograd::AccumulateGrad":
        return True
    following = node.next_functions
    kind = node.name().rstrip("0123456789").removesuffix("Backward")
    return (
        kind in _OF_PARAMETERS
        and bool(following)
        and all(other is not None and _is_parameter(other) for other, _ in following)
    )


@contextmanager
def watched(module: nn.Module, names: Sequence[str]) -> Iterator[dict[str, list[tuple[Tensor, Tensor]]]]:
    """Note what some submodules are called with, and what they return, call by call."""
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in names}
    with ExitStack() as hooks:
        for name in names:
            hook = module.get_submodule(name).register_forward_hook(
                lambda _module, inputs, result, name=name: calls[name].append((inputs[0], result))
            )
            hooks.enter_context(hook)
        yield calls
