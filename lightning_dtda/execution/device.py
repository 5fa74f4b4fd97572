"""Devices, by the names that users give."""

from __future__ import annotations

import torch

from lightning_dtda.errors import ExecutionError


def usable_device(device: torch.device | str) -> torch.device:
    """Return a device that there is.

    Raises:
        ExecutionError: If there is none of this name.
    """
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ExecutionError(
            f"There is no device {str(device)!r} ({reason}). Give cpu, cuda or cuda:0, say."
        ) from error
