"""Size of a stack: the number of trainings that fit in memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_dtda.execution.memory import available_memory, peak_memory

_SHARE = 0.5
"""Share of the free memory to use: the allocator and the measurement take some, and other programs may need some."""

COPIES = 8
"""Number of copies of the parameters in addition to a step's memory: the optimizer's states, old and new."""

LARGEST = 512
"""Maximum number of trainings at once: well below it, their arithmetic already outweighs the fixed cost of a step."""


def stack_size(step: Callable[[], Any], theta: Tensor, trainings: int, device: torch.device) -> int:
    """Return the number of trainings to run at once, chosen so that all stacks have about the same size.

    Args:
        step: Function that computes the gradient of one training.
        theta: Parameters of one training ``(1, P)``.
        trainings: Total number of trainings.
        device: Device to train on.
    """
    step()  # one-time allocations do not count
    # at least one, even if memory is short: there is no alternative
    most = max(fitting(peak_memory(step, device), theta, device), 1)
    return math.ceil(trainings / math.ceil(trainings / most))


@dataclass(frozen=True)
class Footprint:
    """Bytes that a training takes in addition to its steps.

    Args:
        device: Bytes on the device it trains on.
        host: Bytes in host memory.
    """

    device: int = 0
    host: int = 0


NOTHING = Footprint()


def fitting(of_step: int, theta: Tensor, device: torch.device, beside: Footprint = NOTHING) -> int:
    """Return the number of trainings that fit in memory at once.

    Args:
        of_step: Bytes that the gradient of one training takes.
        theta: Parameters of one training ``(1, P)``.
        device: Device to train on.
        beside: Additional memory of each training.
    """
    needed = {device: of_step + COPIES * theta.numel() * theta.element_size() + beside.device}
    if beside.host:
        host = torch.device("cpu")
        needed[host] = needed.get(host, 0) + beside.host
    most = LARGEST
    for where, each in needed.items():
        available = available_memory(where)
        if available is not None:
            most = min(most, int(_SHARE * available / each))
    return most
