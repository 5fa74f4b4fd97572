r"""The loss as a function of the network's outputs: the two factors of the Gauss-Newton matrix.

The outputs are the tensors produced by the last parameters on each path from the parameters to the loss. The function
from the outputs to the loss has no parameters.
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
"""Operations that compute a layer's weight from its parameters: views, casts, weight normalisation. Looking up an
embedding is not one of them, but a layer."""


class Outputs:
    r"""The outputs z of a pass, and derivatives of both functions in :math:`L = \ell(z(\theta))`.

    Args:
        loss: Loss L with its graph.
        cut: Tensors at which the example weights act.
        parameters: Parameters :math:`\theta` in the order of the layout.
        last_parametrised: Whether to walk back from the cut to the tensors that the last parameters produce.
    """

    def __init__(
        self, loss: Tensor, cut: Sequence[CutTensor], parameters: Sequence[Tensor], last_parametrised: bool = True
    ) -> None:
        self._loss = loss
        self._parameters = list(parameters)
        self.tensors = _last_parametrised(cut) if last_parametrised else list(cut)
        self.shapes = [shapes_out_of(tensor.node)[tensor.output] for tensor in self.tensors]
        """Shape of each output tensor."""
        self._arrived: list[Tensor] | None = None

    def gradient(self) -> list[Tensor]:
        """Return the derivatives of the loss with respect to the outputs, with their graph."""
        if self._arrived is None:
            with self._cut_off():
                self._arrived = list(grad(self._loss, edges_of(self.tensors), create_graph=True))
        return self._arrived

    def _cut_off(self) -> AbstractContextManager[None]:
        """Stop gradients at the outputs, so that an output does not count as the input of another one."""
        return changed_at(self.tensors, lambda number, tensor, gradient: torch.zeros_like(gradient))

    def curve(self, along: Sequence[Tensor]) -> list[Tensor]:
        r"""Return :math:`\nabla^2_z \ell\, u` for a direction u in output space."""
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
        r"""Return :math:`J^\top u` for a direction u in output space, with J by the parameters or by other tensors."""
        by = self._parameters if by is None else list(by)
        found = grad(
            edges_of(self.tensors), by, list(along), retain_graph=True, create_graph=create_graph, allow_unused=True
        )
        return [zeros(one, like) for one, like in zip(found, by, strict=True)]

    def push(self, direction: Sequence[Tensor]) -> list[Tensor]:
        r"""Return :math:`J v` for a direction v in parameter space."""
        along, pulled = self._pull_back
        return derivative(pulled, direction, along)

    @cached_property
    def _pull_back(self) -> tuple[list[Tensor], list[Tensor]]:
        """Zeros in output space, and their pull-back to the parameters, whose graph is linear in them."""
        along = [torch.zeros_like(one, requires_grad=True) for one in self.gradient()]
        return along, self.pull(along, create_graph=True)

    def hessian(self) -> Tensor:
        r"""Return :math:`\nabla^2_z \ell` ``(C, C)`` over all C outputs, flattened and concatenated."""
        like = self.gradient()
        units = torch.eye(sum(part.numel() for part in like), dtype=like[0].dtype, device=like[0].device)
        return torch.stack([torch.cat([part.reshape(-1) for part in self.curve(self.split(unit))]) for unit in units])

    def split(self, flat: Tensor) -> list[Tensor]:
        """Split a direction in output space ``(C,)`` into one tensor per output tensor."""
        sizes = [one.numel() for one in self.gradient()]
        return [
            part.reshape(one.shape).to(one.dtype) for part, one in zip(flat.split(sizes), self.gradient(), strict=True)
        ]


_PRODUCTS = frozenset({"AddmmBackward0", "MmBackward0"})
_VIEWS = frozenset({"ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0"})
"""A linear layer returns a view of a product of matrices if its input has more than two dimensions."""


def _last_parametrised(cut: Sequence[CutTensor]) -> list[CutTensor]:
    """Walk back from the tensors at which weights act to those that a parameter produces."""

    def look(edges: tuple[Edge, ...]) -> Rows | None:
        following = edges[0][0].next_functions
        return Rows(0) if any(other is not None and _is_parameter(other) for other, _ in following) else None

    return [_of_layer(found) for found in walk([((z.node, z.output),) for z in reversed(cut)], look)]


def _of_layer(tensor: CutTensor) -> CutTensor:
    """Return the view of a tensor that its layer returns, if everything else depends on it only through that view."""
    user = tensor.users[0][0] if len(tensor.users) == 1 and tensor.node.name() in _PRODUCTS else None
    return CutTensor(user, 0, Rows(0)) if user is not None and user.name() in _VIEWS else tensor


def _is_parameter(node: Any) -> bool:
    """Return whether a node is a parameter, or computed from parameters alone by ``_OF_PARAMETERS``."""
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
    """Collect the input and output of every call of some submodules."""
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in names}
    with ExitStack() as hooks:
        for name in names:
            hook = module.get_submodule(name).register_forward_hook(
                lambda _module, inputs, result, name=name: calls[name].append((inputs[0], result))
            )
            hooks.enter_context(hook)
        yield calls
