"""Small pictures of tensors, arrays, PIL images and figures, as PNG files."""

from __future__ import annotations

import io
import struct
import sys
import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

THUMBNAIL = 96
"""Largest height and width of a picture in pixels: legible in a table, and at most 37 KB."""

SIGNATURE = b"\x89PNG\r\n\x1a\n"
"""First bytes of each PNG file."""

_SMALLEST = 5
"""Smallest height and width of a tensor that is taken for an image; below, it is rather a few sequences."""

_COLOUR_TYPES = {1: 0, 3: 2, 4: 6}
"""PNG's numbers for grey, RGB and RGBA, by the number of channels."""

_FIGURE_PIXELS = 320
"""Width of a figure in pixels, at which its text can be read."""


def as_image(value: Any) -> Tensor | None:
    """Return the pixels of an image ``(channels, height, width)`` with 1, 3 or 4 channels; ``None`` of anything else.

    Args:
        value: A PIL image, or a tensor or array ``(H, W)``, ``(C, H, W)`` or ``(H, W, C)``.
    """
    if hasattr(value, "getbands") and hasattr(value, "convert"):
        value = np.array(value if value.mode in ("L", "RGB", "RGBA", "I", "I;16", "F") else value.convert("RGBA"))
    if isinstance(value, np.ndarray) and value.dtype.kind in "buif":
        value = torch.from_numpy(np.array(value, np.uint8 if value.dtype == np.uint8 else np.float64))
    if not isinstance(value, Tensor) or value.is_complex():
        return None
    pixels = value.detach().cpu()
    if pixels.ndim == 2:
        pixels = pixels[None]
    if pixels.ndim == 3 and pixels.shape[0] not in _COLOUR_TYPES:
        pixels = pixels.permute(2, 0, 1)
    is_image = pixels.ndim == 3 and pixels.shape[0] in _COLOUR_TYPES and min(pixels.shape[1:]) >= _SMALLEST
    return pixels if is_image else None


def thumbnail(pixels: Tensor) -> bytes:
    """Return a PNG file of at most :data:`THUMBNAIL` pixels a side; smaller images are enlarged by a whole factor.

    Args:
        pixels: Image ``(channels, height, width)``: uint8, or numbers in [0, 1]; others are scaled by their own range.
    """
    step = max(1, max(pixels.shape[1:]) // (4 * THUMBNAIL))  # of a photograph, a part is enough
    levels = _levels(pixels[:, ::step, ::step])
    height, width = levels.shape[1:]
    if max(height, width) > THUMBNAIL:
        scale = THUMBNAIL / max(height, width)
        size = [max(1, round(height * scale)), max(1, round(width * scale))]
        levels = torch.nn.functional.interpolate(levels[None], size=size, mode="area")[0]
    else:
        factor = THUMBNAIL // max(height, width)
        levels = levels.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    return png(levels.round().to(torch.uint8))


def _levels(pixels: Tensor) -> Tensor:
    """Return the brightness from 0 to 255, float32."""
    if pixels.dtype == torch.uint8:
        return pixels.float()
    values = pixels.double().nan_to_num(0.0, 0.0, 0.0)
    low, high = values.min(), values.max()
    if low < 0 or high > 1:
        values = (values - low) / (high - low).clamp_min(torch.finfo(torch.float64).tiny)
    return (255 * values).float()


def png(pixels: Tensor) -> bytes:
    """Encode an image ``(channels, height, width)``, uint8 with 1, 3 or 4 channels, as a PNG file."""
    channels, height, width = pixels.shape
    rows = pixels.permute(1, 2, 0).reshape(height, -1).numpy()
    content = b"".join(b"\0" + row.tobytes() for row in rows)  # each row starts with its filter, here none
    header = struct.pack(">2I5B", width, height, 8, _COLOUR_TYPES[channels], 0, 0, 0)
    return SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(content, 9)) + _chunk(b"IEND", b"")


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def figure_png(value: Any) -> bytes | None:
    """Return a PNG file of a figure of matplotlib or plotly; ``None`` of anything else."""
    if callable(getattr(value, "savefig", None)):
        file = io.BytesIO()
        value.savefig(file, format="png", dpi=_FIGURE_PIXELS / value.get_figwidth())
        if pyplot := sys.modules.get("matplotlib.pyplot"):
            pyplot.close(value)  # pyplot keeps every figure that it makes
        return file.getvalue()
    if callable(getattr(value, "to_image", None)):
        return bytes(value.to_image("png", width=_FIGURE_PIXELS, height=round(0.75 * _FIGURE_PIXELS)))
    return None
