"""How many trainings are stacked: as many as fit memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_dtda.execution.memory import available_memory, peak_memory

_SHARE = 0.5
"""Share of the memory that is free now: the allocator and the measurement take some, and others may want some too."""

_COPIES = 8
"""Copies of the parameters beside a step's own memory: the optimizer's states, old and new."""

LARGEST = 512
"""More trainings at once are no faster: their arithmetic hides all that is done once a step long before."""


def stack_size(step: Callable[[], Any], theta: Tensor, trainings: int, device: torch.device) -> int:
    """Return how many trainings are done at once, so that all stacks are about of one size.

    Args:
        step: Computes the gradient of one training.
        theta: Its parameters ``(1, P)``.
        trainings: How many there are.
        device: Where.
    """
    step()  # what is made once, and kept, does not count
    # one at a time where memory is short: there is no other way to do it
    most = max(fitting(peak_memory(step, device), theta, device), 1)
    return math.ceil(trainings / math.ceil(trainings / most))


@dataclass(frozen=True)
class Footprint:
    """Bytes that a training takes beside its steps.

    Args:
        device: Where it trains.
        host: In the machine's own memory.
    """

    device: int = 0
    host: int = 0


NOTHING = Footprint()


def fitting(of_step: int, theta: Tensor, device: torch.device, beside: Footprint = NOTHING) -> int:
    """Return how many trainings fit at once.

    Args:
        of_step: Bytes that the gradient of one takes.
        theta: Its parameters ``(1, P)``.
        device: Where.
        beside: What one takes beside that.
    """
    needed = {device: of_step + _COPIES * theta.numel() * theta.element_size() + beside.device}
    if beside.host:
        host = torch.device("cpu")
        needed[host] = needed.get(host, 0) + beside.host
    most = LARGEST
    for where, each in needed.items():
        available = available_memory(where)
        if available is not None:
            most = min(most, int(_SHARE * available / each))
    return most
