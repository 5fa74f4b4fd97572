"""The states of the random number generators that a training step draws from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


def random_states(device: torch.device) -> dict[str, Tensor]:
    """Return the generators' states by device type: ``cpu``, and ``cuda`` for a module on such a device."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_states(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Set the generators to what :func:`random_states` returned."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


@contextmanager
def kept_random_states(device: torch.device) -> Iterator[None]:
    """Leave the generators as they were, whatever is drawn inside."""
    before = random_states(device)
    try:
        yield
    finally:
        set_random_states(before, device)
