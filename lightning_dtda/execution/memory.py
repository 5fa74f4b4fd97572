"""The memory of tensor computations: what there is, what they need, and how to keep what they will need again."""

from __future__ import annotations

import ctypes
import gc
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_dtda.compatibility import TorchDispatchMode, address, allocations, is_profiled, tree_leaves

# parameters of mallopt(3)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_THRESHOLD = 32 * 2**20
"""Bytes that glibc raises the threshold of mmap to by itself as large blocks are freed, and that of trimming to twice
as many. Once either was set, it leaves both as they are."""

_OBJECTS = 16 * 2**20
"""Bytes of traces, autograd graphs and the like, which are no tensors."""

_KEEP_BYTES = 2**30
"""Freed memory that is kept, and the largest block that is taken from it: more than a sweep's temporaries."""


def available_memory(device: torch.device) -> int | None:
    """Return the bytes that can still be allocated on a device, ``None`` where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    meminfo = Path("/proc/meminfo")
    if device.type != "cpu" or not meminfo.exists():
        return None
    lines = meminfo.read_text().splitlines()
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def peak_memory(function: Callable[[], Any], device: torch.device) -> int:
    """Run a function and return the most bytes that its tensors took at once, beyond those alive before.

    From the allocator on CUDA devices, elsewhere from the profiler's record of allocations; or, where a profiler runs
    already, from the tensors that operations return, without what they take for themselves.

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
    gc.disable()  # what garbage there is would be counted as if it came from the function when it is freed
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


def resident_memory(of_tensors: float, device: torch.device) -> float:
    """Return the bytes by which a process grows that runs something within :func:`kept_pages`.

    On the CPU, freed memory is kept beside what is in use: on a CNN and a GPT of 0.1 and 0.8 million parameters about
    as much again (``benchmarks/announced.py``), and no more than is allowed. Python's own objects come on top.

    Args:
        of_tensors: The most bytes that tensors take at once.
        device: Where they are.
    """
    return of_tensors + min(of_tensors, _KEEP_BYTES) + _OBJECTS if device.type == "cpu" else of_tensors


@contextmanager
def kept_pages(device: torch.device) -> Iterator[None]:
    """Let glibc's allocator keep freed memory while a sweep runs on the CPU, and give it back afterwards.

    A sweep frees and allocates the same megabytes thousands of times; by default the allocator returns them to the
    system each time, and fresh pages cost as much as the arithmetic. Afterwards the thresholds are those that glibc
    comes to by itself once a tensor of 32 MiB was freed; there is no way back to lower ones that it raises by itself.
    Elsewhere than on glibc this does nothing.
    """
    libc = ctypes.CDLL(None) if device.type == "cpu" and sys.platform == "linux" else None
    if libc is None or not (hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim")):
        yield
        return
    libc.mallopt(_M_TRIM_THRESHOLD, _KEEP_BYTES)
    # older versions of glibc refuse more than the largest threshold that they would choose themselves
    libc.mallopt(_M_MMAP_THRESHOLD, _KEEP_BYTES) or libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_THRESHOLD)
    try:
        yield
    finally:
        libc.mallopt(_M_TRIM_THRESHOLD, 2 * _LARGEST_THRESHOLD)
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_THRESHOLD)
        libc.malloc_trim(0)
