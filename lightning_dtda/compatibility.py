"""Every dependence on a private name of torch or Lightning, each with an error that says what is missing."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from types import ModuleType
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from lightning_dtda.errors import ReplayError

_KNOWN = "torch 2.6 to 2.13 and lightning 2.5 to 2.6"
"""Versions with which these names are known to be there."""


def missing(what: str, error: BaseException) -> str:
    """Return what an error says where a private name is gone."""
    return (
        f"{what} is not where it was: this is torch {torch.__version__} and lightning {pl.__version__} ({error!r}). "
        f"Install versions that lightning-dtda knows: {_KNOWN}."
    )


def shapes_out_of(node: Any) -> list[tuple[int, ...]]:
    """Return the shapes of the tensors that a node of autograd's graph stands for.

    Raises:
        ReplayError: If this version of torch keeps them elsewhere.
    """
    try:
        return [tuple(metadata.shape) for metadata in node._input_metadata]
    except AttributeError as error:
        raise ReplayError(missing("What autograd knows of a tensor's shape", error)) from error


def prelu_backward() -> Any:
    """Return the operation behind PReLU's derivative; ``None`` where a version of torch has none of this name."""
    return getattr(getattr(torch.ops.aten, "_prelu_kernel_backward", None), "default", None)


class _Substitutes(threading.local):
    """What is called in this thread in place of functions of a module's, by the module's and the function's name."""

    def __init__(self) -> None:
        self.functions: dict[tuple[str, str], Callable[..., Any]] = {}


_substitutes = _Substitutes()
_substituted: dict[tuple[str, str], tuple[Callable[..., Any], int]] = {}
"""The module's own functions, and how many threads have substitutes for them."""
_lock = threading.Lock()


@contextmanager
def _substituted_in(place: ModuleType, functions: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Have others called in place of functions of a module, by this thread only: others may train at the same time.

    Args:
        place: The module.
        functions: By the name of the function that they stand for, which is given to them before its arguments.
    """
    before = _substitutes.functions
    of_this_thread = dict(before)
    with _lock:
        for name, function in functions.items():
            key = (place.__name__, name)
            own, users = _substituted.get(key, (getattr(place, name), 0))
            _substituted[key] = own, users + 1
            of_this_thread[key] = partial(function, own)
            if not users:
                setattr(place, name, partial(_call, key, own))
    _substitutes.functions = of_this_thread
    try:
        yield
    finally:
        _substitutes.functions = before
        with _lock:
            for name in functions:
                key = (place.__name__, name)
                own, users = _substituted.pop(key)
                if users > 1:
                    _substituted[key] = own, users - 1
                else:
                    setattr(place, name, own)


def _call(key: tuple[str, str], own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return _substitutes.functions.get(key, own)(*args, **kwargs)


@contextmanager
def twice_differentiable_weight_norm() -> Iterator[None]:
    """Compute weight normalisation in plain operations: of torch's own, the second derivative is wrong (torch 2.13).

    Its norms count as constants there. A version without these names is left as it is.
    """

    def weight_norm(_own: Any, direction: Tensor, length: Tensor, dim: int = 0) -> Tensor:
        return direction * (length / torch.norm_except_dim(direction, 2, dim))

    with ExitStack() as stack:
        for place in (torch, sys.modules.get("torch.nn.utils.weight_norm")):
            if place is not None and hasattr(place, "_weight_norm"):
                stack.enter_context(_substituted_in(place, {"_weight_norm": weight_norm}))
        yield


@contextmanager
def replaced_recurrence(functions: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Have recurrent layers call other functions in place of torch's, in this thread.

    Args:
        functions: By the name of what they stand for (``"lstm"``), which is given to them before its arguments.

    Raises:
        ReplayError: If this version of torch keeps them elsewhere.
    """
    place: Any = getattr(torch, "_VF", None)
    try:
        for name in functions:
            getattr(place, name)
    except AttributeError as error:
        raise ReplayError(missing("What recurrent layers call", error)) from error
    with _substituted_in(place, functions):
        yield


def onednn_linear() -> Callable[..., Tensor] | None:
    """Return a linear layer's function by oneDNN's kernel; ``None`` where a build of torch has none."""
    operation = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if operation is None:
        return None
    return lambda x, weight, bias=None: operation(x, weight, bias, "none", [], "")


def is_traced() -> bool:
    """Whether what runs is traced by ``make_fx``."""
    return get_proxy_mode() is not None


def is_transformed() -> bool:
    """Whether what runs is transformed by one of ``torch.func``."""
    return bool(torch._C._are_functorch_transforms_active())


def is_a(value: object, name: str) -> bool:
    """Whether something is an instance of a class of Lightning's, of either of its two packages.

    ``lightning.pytorch`` and ``pytorch_lightning`` are the same code, but their classes are not the same.

    Args:
        value: Anything.
        name: Of the class, with the module below either package where it is not at the top: ``callbacks.Timer``.
    """
    return isinstance(value, kinds(name))


def kinds(*names: str) -> tuple[type, ...]:
    """Return classes of Lightning's by their names, from both packages as far as they are in use.

    A name that a version does not have stands for no class.
    """
    found = []
    for package in ("lightning.pytorch", "pytorch_lightning"):
        for name in names:
            value: Any = sys.modules.get(package)
            for part in name.split("."):
                value = getattr(value, part, None)
            if isinstance(value, type):
                found.append(value)
    return tuple(found)


def overrides(instance: object, hook: str) -> bool:
    """Whether a module, a data module or a callback has a hook of its own, in place of Lightning's."""
    if hook in getattr(instance, "__dict__", {}):
        return True
    own = getattr(type(instance), hook, None)
    if own is None:
        return False
    bases = kinds("LightningModule", "LightningDataModule", "Callback")
    return not any(own is getattr(base, hook, None) for base in bases)
