"""All dependencies on private names of torch, Lightning and W&B, each with an error that says what is missing."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.profiler import profile
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm as InstanceNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map, tree_map_only, tree_unflatten

from lightning_dtda.errors import CompatibilityError

__all__ = [
    "BatchNorm",
    "InstanceNorm",
    "TorchDispatchMode",
    "TreeSpec",
    "address",
    "allocations",
    "average_function",
    "averaged_model",
    "averages_buffers",
    "changes_gradients",
    "dropout_rate",
    "fetched",
    "give_trainer",
    "is_a",
    "is_compiled",
    "is_in_place",
    "is_profiled",
    "is_traced",
    "is_transformed",
    "is_view",
    "keep_index_sampler",
    "kinds",
    "log_as_input",
    "onednn_linear",
    "overrides",
    "padding_of",
    "plain_results",
    "prelu_backward",
    "replaced_recurrence",
    "sample_count",
    "saved_for_backward",
    "shaped",
    "shapes_out_of",
    "training_loaders",
    "tree_flatten",
    "tree_leaves",
    "tree_map",
    "tree_map_only",
    "tree_unflatten",
    "twice_differentiable_weight_norm",
    "unscales_gradients",
]

_KNOWN = "torch 2.6 to 2.13, lightning 2.5 to 2.6 and wandb 0.19.10 to 0.31"
"""Versions in which these names are known to exist."""


def missing(what: str, error: BaseException) -> CompatibilityError:
    """Return the error for a private name that no longer exists."""
    packages = ("torch", "lightning", "pytorch-lightning", "wandb")
    versions = [f"{name} {version(name)}" for name in packages if _is_installed(name)]
    return CompatibilityError(
        f"{what} cannot be found in {' and '.join(versions)} ({error!r}). Install versions that lightning-dtda "
        f"supports: {_KNOWN}."
    )


def _is_installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def _private(owner: Any, name: str, what: str) -> Any:
    """Return an attribute that is private to torch, Lightning or W&B.

    Args:
        owner: Object that has the attribute.
        name: Name of the attribute.
        what: What the attribute holds, for the error.

    Raises:
        CompatibilityError: If there is no such attribute.
    """
    try:
        return getattr(owner, name)
    except AttributeError as error:
        raise missing(what, error) from error


# -- torch: graphs, kernels, tensors


def shapes_out_of(node: Any) -> list[tuple[int, ...]]:
    """Return the shapes of the output tensors of a node in the autograd graph.

    Raises:
        CompatibilityError: If this version of torch does not store them there.
    """
    metadata = _private(node, "_input_metadata", "The shape of a tensor in the autograd graph")
    return [tuple(of_output.shape) for of_output in metadata]


def dropout_rate(node: Any) -> float:
    """Return the rate of the dropout inside the kernel of a node in the autograd graph; zero if it has none."""
    return float(getattr(node, "_saved_dropout_p", getattr(node, "_saved_dropout", 0.0)))


def saved_for_backward(node: Any, name: str) -> Any:
    """Return an argument that a node in the autograd graph kept for its derivative; ``None`` if it kept none."""
    return getattr(node, f"_saved_{name}", None)


def padding_of(convolution: nn.Module) -> Any:
    """Return the padding of a convolution as :func:`torch.nn.functional.pad` takes it."""
    return _private(convolution, "_reversed_padding_repeated_twice", "The padding of a convolution")


def shaped(cls: type[Any], shape: Sequence[int], like: Tensor) -> Any:
    """Return a tensor of a subclass with a shape but without memory, of the type and device of another one."""
    make = _private(Tensor, "_make_wrapper_subclass", "The function that makes tensors without memory")
    return make(cls, shape, dtype=like.dtype, device=like.device)


def plain_results() -> AbstractContextManager[Any]:
    """Return a context in which functions of tensors of a subclass return plain tensors."""
    context: AbstractContextManager[Any] = torch._C.DisableTorchFunctionSubclass()
    return context


def is_in_place(operation: Any) -> bool:
    """Return whether an operation of torch changes one of its arguments."""
    return bool(_private(operation, "_schema", "The signature of an operation").is_mutable)


def allocations(function: Callable[[], object]) -> list[int]:
    """Run a function under torch's profiler; return the bytes that were allocated, or freed if negative, in order.

    The profiler's own tables of the same events take a hundred times as long to make as the events to be read.

    Raises:
        CompatibilityError: If this version of torch stores them elsewhere.
    """
    # the profiler otherwise says on the terminal that it starts and stops; it reads this when it is first used
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    with profile(profile_memory=True) as record:
        function()
    try:
        events = record.kineto_results.events()
        changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    except AttributeError as error:
        raise missing("The profiler's record of allocations", error) from error
    return [change for _, change in sorted(changes, key=lambda change: change[0])]


def is_profiled() -> bool:
    """Return whether one of torch's profilers is running."""
    return bool(_private(torch.autograd, "_profiler_enabled", "Whether a profiler is running")())


def address(storage: torch.UntypedStorage) -> int:
    """Return a number that identifies a tensor's storage as long as it is alive."""
    return int(_private(storage, "_cdata", "The address of a storage"))


def is_view(operation: Any) -> bool:
    """Return whether an operation of a traced graph gives a tensor another shape without moving its values."""
    return operation in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)


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
        CompatibilityError: If this version of torch does not have the original functions there.
    """
    place: Any = getattr(torch, "_VF", None)
    try:
        for name in functions:
            getattr(place, name)
    except AttributeError as error:
        raise missing("A function that recurrent layers call", error) from error
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


# -- Lightning: the Trainer, its loops and callbacks


def give_trainer(module: nn.Module, trainer: Any) -> None:
    """Set the Trainer of a LightningModule to something that is not a Trainer."""
    module._trainer = trainer


def is_compiled(module: nn.Module) -> bool:
    """Return whether ``torch.compile`` replaced methods of a LightningModule by compiled ones."""
    return getattr(module, "_compiler_ctx", None) is not None


def training_loaders(trainer: Any) -> Any:
    """Return the collection of a Trainer's training DataLoaders; ``None`` before they are loaded.

    Raises:
        CompatibilityError: If this version of Lightning stores it elsewhere.
    """
    return _private(trainer.fit_loop, "_combined_loader", "The Trainer's collection of DataLoaders")


def fetched(trainer: Any) -> tuple[Any, int]:
    """Return the sampler's iterator, and the number of the batch that a Trainer with one DataLoader just fetched.

    Raises:
        CompatibilityError: If this version of Lightning or torch stores them elsewhere.
    """
    try:
        fetcher = trainer.fit_loop._data_fetcher
        iterator = fetcher.combined_loader._iterator.iterators[0]
        ahead = len(getattr(fetcher, "batches", ()))
        return iterator._sampler_iter, iterator._num_yielded - 1 - ahead
    except AttributeError as error:
        raise missing("The iterator of the training DataLoader", error) from error


def keep_index_sampler(loader: Any, sampler: Any) -> None:
    """Set the sampler of a DataLoader's iterator, if it has one that outlives the epoch (persistent workers)."""
    iterator = getattr(loader, "_iterator", None)
    if iterator is not None:
        iterator._index_sampler = sampler


def sample_count(sampler: Any) -> int | None:
    """Return the number of samples that a random sampler draws by its arguments; ``None`` for one of each example."""
    count: int | None = _private(sampler, "_num_samples", "The number of samples of a RandomSampler")
    return count


def changes_gradients(strategy: Any) -> bool:
    """Return whether a DDP strategy applies anything other than the mean of the processes' gradients.

    Raises:
        CompatibilityError: If this version of Lightning stores its settings elsewhere.
    """
    names = ("_ddp_comm_hook", "_model_averaging_period")
    return any(_private(strategy, name, "A setting of the DDPStrategy") is not None for name in names)


def unscales_gradients(optimizer: Any) -> bool:
    """Return whether an optimizer unscales the gradients of a gradient scaler inside its step."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def averaged_model(callback: Any) -> Any:
    """Return the model in which a callback of Lightning averages weights."""
    return _private(callback, "_average_model", "The model with averaged weights")


def averages_buffers(callback: Any) -> bool:
    """Return whether a callback of Lightning averages buffers as well as weights."""
    return bool(_private(callback, "_use_buffers", "The setting whether buffers are averaged"))


def average_function(callback: Any) -> Any:
    """Return the function by which StochasticWeightAveraging averages weights."""
    return _private(callback, "_avg_fn", "The function that averages weights")


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


# -- W&B


def log_as_input(run: Any, artifact: Any) -> None:
    """Log an artifact as an input of an offline run of W&B.

    ``use_artifact`` refuses offline runs, for the sake of names that only the server knows. An artifact that comes with
    its content needs no server before the run is synced.
    """
    log = _private(run, "_log_artifact", "What logs an artifact as an input")
    log(artifact, is_user_created=True, use_after_commit=True)
