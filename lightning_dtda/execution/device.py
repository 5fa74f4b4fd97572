"""Devices by name."""

from __future__ import annotations

import torch

from lightning_dtda.errors import ExecutionError


def usable_device(device: torch.device | str) -> torch.device:
    """Return a device after checking that it exists.

    Raises:
        ExecutionError: If there is no device with this name.
    """
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ExecutionError(
            f"There is no device {str(device)!r} ({reason}). Give one that exists, such as cpu, cuda or cuda:0."
        ) from error
