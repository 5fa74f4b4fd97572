"""Memory of tensor computations: how much is available, how much they need, and how to keep freed memory for reuse."""

from __future__ import annotations

import ctypes
import gc
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import psutil
import torch
from torch import Tensor
from typing_extensions import override

from lightning_dtda.compatibility import TorchDispatchMode, address, allocations, is_profiled, tree_leaves

# parameters of mallopt(3)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_THRESHOLD = 32 * 2**20
"""Bytes to which glibc raises the threshold of mmap as large blocks are freed, and half of that to which it raises the
threshold of trimming. Once either was set by hand, glibc leaves both unchanged."""

OBJECTS, TRACES, COMPILER = 4 * 2**20, 8 * 2**20, 128 * 2**20
"""Bytes of autograd graphs and other objects that are not tensors; of traces, if passes are traced; and of torch's
compiler with what it keeps of a step."""

_KEEP_BYTES = 2**30
"""Bytes of freed memory to keep, and of the largest block taken from it: more than a sweep's temporaries."""


def available_memory(device: torch.device) -> int | None:
    """Return the number of bytes that can still be allocated on a device; ``None`` if the system does not report it."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return psutil.virtual_memory().available if device.type == "cpu" else None


def peak_memory(function: Callable[[], Any], device: torch.device) -> int:
    """Run a function and return the peak number of bytes of its tensors, not counting those alive before.

    The peak comes from the allocator on CUDA devices, and from the profiler's record of allocations elsewhere. If a
    profiler is already running, only the tensors that operations return are counted, not their temporary memory.

    Example:
        >>> peak_memory(lambda: torch.ones(1000) + torch.ones(1000), torch.device("cpu"))
        12000
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    was_enabled = gc.isenabled()
    gc.disable()  # older garbage, freed meanwhile, would be counted as the function's
    try:
        if not is_profiled():
            return max(accumulate(allocations(function), initial=0))
        with _Storages() as storages:  # a second profiler would end the first
            function()
        return storages.peak
    finally:
        if was_enabled:
            gc.enable()


class _Storages(TorchDispatchMode):
    """Counts the bytes of what operations return, as long as it is alive."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._alive = 0
        self._known: set[int] = set()

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._count((args, kwargs), is_new=False)
        result = func(*args, **(kwargs or {}))
        self._count(result, is_new=True)
        self.peak = max(self.peak, self._alive)
        return result

    def _count(self, tensors: Any, is_new: bool) -> None:
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor) and (key := address(storage := tensor.untyped_storage())) not in self._known:
                size = storage.nbytes() if is_new else 0
                self._known.add(key)
                self._alive += size
                weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._alive -= size


def resident_memory(of_tensors: float, device: torch.device, objects: float = OBJECTS) -> float:
    """Return the number of bytes by which a process grows when it runs something within :func:`kept_pages`.

    On the CPU, freed memory is kept in addition to memory in use: about the same amount again for a CNN and a GPT with
    0.1 and 0.8 million parameters (``benchmarks/announced.py``), up to the limit. Objects come on top.

    Args:
        of_tensors: Peak number of bytes of the tensors.
        device: Device of the tensors.
        objects: Bytes of objects that are not tensors.
    """
    return of_tensors + min(of_tensors, _KEEP_BYTES) + objects if device.type == "cpu" else of_tensors


@contextmanager
def kept_pages(device: torch.device) -> Iterator[None]:
    """Let glibc's allocator keep freed memory while a sweep runs on the CPU, and release it afterwards.

    A sweep frees and allocates the same megabytes thousands of times. By default, the allocator returns them to the
    system each time, and fresh pages cost as much as the arithmetic. Afterwards, the thresholds are those that glibc
    itself reaches once a tensor of 32 MiB was freed; lower ones, which glibc would raise dynamically, cannot be
    restored. Without glibc, this does nothing.
    """
    libc = ctypes.CDLL(None) if device.type == "cpu" and sys.platform == "linux" else None
    if libc is None or not (hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim")):
        yield
        return
    libc.mallopt(_M_TRIM_THRESHOLD, _KEEP_BYTES)
    # older versions of glibc reject values above the largest threshold that they would choose themselves
    libc.mallopt(_M_MMAP_THRESHOLD, _KEEP_BYTES) or libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_THRESHOLD)
    try:
        yield
    finally:
        libc.mallopt(_M_TRIM_THRESHOLD, 2 * _LARGEST_THRESHOLD)
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_THRESHOLD)
        libc.malloc_trim(0)
