"""Selects torch's kernels for a pass: those of the training, or those that can be differentiated twice."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lightning_dtda.compatibility import dropout_rate
from lightning_dtda.replay.cut import nodes_behind

_cuda = torch.backends.cuda


def _use_cudnn(enabled: bool) -> None:
    torch.backends.cudnn.enabled = enabled


def _use_mkldnn(enabled: bool) -> None:
    torch.backends.mkldnn.enabled = enabled  # type: ignore[assignment]


_SWITCHES: dict[str, tuple[Callable[[], bool], Callable[[bool], None]]] = {
    "cudnn": (lambda: torch.backends.cudnn.enabled, _use_cudnn),
    "mkldnn": (lambda: bool(torch.backends.mkldnn.enabled), _use_mkldnn),
    "flash_attention": (_cuda.flash_sdp_enabled, _cuda.enable_flash_sdp),
    "efficient_attention": (_cuda.mem_efficient_sdp_enabled, _cuda.enable_mem_efficient_sdp),
    "cudnn_attention": (_cuda.cudnn_sdp_enabled, _cuda.enable_cudnn_sdp),
    "fused_encoder_layers": (torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled),
}
"""Kernels that can be switched on and off in torch, each with functions that query and set the switch."""

_DROPOUT_INSIDE = {
    "CudnnRnnBackward0": "recurrent layer",
    "ScaledDotProductFlashAttentionBackward0": "attention",
    "ScaledDotProductEfficientAttentionBackward0": "attention",
    "ScaledDotProductCudnnAttentionBackward0": "attention",
}
"""Autograd nodes whose kernels may apply dropout, and what the kernel computes."""

WITH_SECOND_DERIVATIVES = frozenset({"cudnn", "mkldnn"})
"""Switchable kernels that can be differentiated twice, except in recurrent layers."""


def enabled_kernels() -> list[str]:
    """Return the names of the kernels that are switched on."""
    return [name for name, (is_on, _) in _SWITCHES.items() if is_on()]


@contextmanager
def using_kernels(names: Iterable[str]) -> Iterator[None]:
    """Switch on the named kernels and switch off the others, inside this context."""
    before, wanted = enabled_kernels(), set(names)
    try:
        for name, (_, switch) in _SWITCHES.items():
            switch(name in wanted)
        yield
    finally:
        for name, (_, switch) in _SWITCHES.items():
            switch(name in before)


def rounds_products(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether a GPU rounds single precision to ten bits (TF32) in matrix products or convolutions.

    For convolutions, this is torch's default.
    """
    if device.type != "cuda" or dtype != torch.float32:
        return False
    try:
        return torch.backends.cudnn.allow_tf32 or _cuda.matmul.allow_tf32
    except RuntimeError:  # torch 2.9 or later, if the precision was set through its new interface
        return True


def tolerated(dtype: torch.dtype, device: torch.device, in_double: float = 1e-9) -> float:
    """Return the largest relative difference between two computations of the same value that counts as rounding.

    A derivative that depends on an example differs by far more. Products that are rounded to ten bits can differ by
    about 1e-2 after norms and cancellation.
    """
    if dtype == torch.float64:
        return in_double
    return 3e-2 if rounds_products(dtype, device) else 1e-3 if dtype == torch.float32 else 1e-2


def drops_out_inside(loss: Tensor) -> str | None:
    """Return which layer in a loss's graph applies dropout inside a kernel, if any.

    No other kernel draws the same random numbers.
    """
    for node in nodes_behind([loss]):
        what = _DROPOUT_INSIDE.get(node.name())
        if what is not None and dropout_rate(node) > 0:
            return what
    return None
