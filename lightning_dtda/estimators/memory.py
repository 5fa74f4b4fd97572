"""Measures the memory of tensor computations on the device that they run on."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def peak_memory(function: Callable[[], Any], device: torch.device) -> int:
    """Run a function and return the most bytes that its tensors took at once, beyond those alive before.

    From the allocator on CUDA devices, elsewhere from the profiler's record of allocations.

    Example:
        >>> peak_memory(lambda: torch.ones(1000) + torch.ones(1000), torch.device("cpu"))
        12000
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    # the profiler otherwise says on the terminal that it starts and stops; it reads this when it is first used
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        function()
    alive = peak = 0
    for event in sorted(record.events() or [], key=lambda event: event.time_range.start):
        alive += event.self_cpu_memory_usage
        peak = max(peak, alive)
    return peak
