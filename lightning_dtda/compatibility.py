"""All dependencies on private names of torch and Lightning, each with an error that says what is missing."""

from __future__ import annotations

import os
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
from torch.autograd.profiler import profile
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from lightning_dtda.errors import AttributionError, ReplayError

_KNOWN = "torch 2.6 to 2.13 and lightning 2.5 to 2.6"
"""Versions in which these names are known to exist."""


def missing(what: str, error: BaseException) -> str:
    """Return the message of an error about a private name that no longer exists."""
    return (
        f"{what} cannot be found in torch {torch.__version__} and lightning {pl.__version__} ({error!r}). Install "
        f"versions that lightning-dtda supports: {_KNOWN}."
    )


def shapes_out_of(node: Any) -> list[tuple[int, ...]]:
    """Return the shapes of the output tensors of a node in the autograd graph.

    Raises:
        ReplayError: If this version of torch does not store them there.
    """
    try:
        return [tuple(metadata.shape) for metadata in node._input_metadata]
    except AttributeError as error:
        raise ReplayError(missing("The shape of a tensor in the autograd graph", error)) from error


def allocations(function: Callable[[], object]) -> list[int]:
    """Run a function under torch's profiler; return the bytes that were allocated, or freed if negative, in order.

    The profiler's own tables of the same events take a hundred times as long to make as the events to be read.

    Raises:
        AttributionError: If this version of torch keeps them elsewhere.
    """
    # the profiler otherwise says on the terminal that it starts and stops; it reads this when it is first used
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    with profile(profile_memory=True) as record:
        function()
    try:
        events = record.kineto_results.events()
        changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    except AttributeError as error:
        raise AttributionError(missing("The profiler's record of allocations", error)) from error
    return [change for _, change in sorted(changes, key=lambda change: change[0])]


def prelu_backward() -> Any:
    """Return the operation that computes PReLU's derivative; ``None`` if this version of torch does not have it."""
    return getattr(getattr(torch.ops.aten, "_prelu_kernel_backward", None), "default", None)


class _Substitutes(threading.local):
    """Functions that this thread calls instead of those of a module, by the names of module and function."""

    def __init__(self) -> None:
        self.functions: dict[tuple[str, str], Callable[..., Any]] = {}


_substitutes = _Substitutes()
_substituted: dict[tuple[str, str], tuple[Callable[..., Any], int]] = {}
"""The original functions, each with the number of contexts in which it is substituted."""
_lock = threading.Lock()


@contextmanager
def _substituted_in(place: ModuleType, functions: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Replace functions of a module for calls from this thread only: other threads may train at the same time.

    Args:
        place: The module.
        functions: Replacements by name of the original, which each of them receives as its first argument.
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
    """Compute weight normalisation with plain operations, since torch's second derivative of it is wrong (torch 2.13).

    torch treats the norms as constants there. Versions of torch without these names are left unchanged.
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
    """Replace the functions that recurrent layers call, in this thread.

    Args:
        functions: Replacements by name of the original (``"lstm"``), which each of them receives as its first argument.

    Raises:
        ReplayError: If this version of torch does not have the original functions there.
    """
    place: Any = getattr(torch, "_VF", None)
    try:
        for name in functions:
            getattr(place, name)
    except AttributeError as error:
        raise ReplayError(missing("A function that recurrent layers call", error)) from error
    with _substituted_in(place, functions):
        yield


def onednn_linear() -> Callable[..., Tensor] | None:
    """Return a function that computes a linear layer with oneDNN; ``None`` if this build of torch does not have it."""
    operation = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if operation is None:
        return None
    return lambda x, weight, bias=None: operation(x, weight, bias, "none", [], "")


def is_traced() -> bool:
    """Return whether the current computation is traced by ``make_fx``."""
    return get_proxy_mode() is not None


def is_transformed() -> bool:
    """Return whether the current computation is transformed by ``torch.func``."""
    return bool(torch._C._are_functorch_transforms_active())


def is_a(value: object, name: str) -> bool:
    """Return whether a value is an instance of a Lightning class, from either of Lightning's two packages.

    ``lightning.pytorch`` and ``pytorch_lightning`` have the same code, but their classes are distinct.

    Args:
        value: Any value.
        name: Name of the class, including its submodule if it is not at the top level: ``callbacks.Timer``.
    """
    return isinstance(value, kinds(name))


def kinds(*names: str) -> tuple[type, ...]:
    """Return Lightning classes by name, from each of its two packages that has been imported.

    Names that the installed version does not have are skipped.
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
    """Return whether a module, a data module or a callback overrides a Lightning hook."""
    if hook in getattr(instance, "__dict__", {}):
        return True
    own = getattr(type(instance), hook, None)
    if own is None:
        return False
    bases = kinds("LightningModule", "LightningDataModule", "Callback")
    return not any(own is getattr(base, hook, None) for base in bases)
