"""Tells whether a data set is the one that was trained on, without reading all of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

_FINGERPRINT_EXAMPLES = 16
"""Examples hashed, evenly spaced over the data set: finds other data and another order at the cost of a batch."""


def dataset_fingerprint(dataset: Any) -> str:
    """Hash evenly spaced examples of a data set; equal for equal data in the same order.

    Example:
        >>> dataset_fingerprint([1, 2, 3]) == dataset_fingerprint([1, 3, 2])
        False
    """
    length = len(dataset)
    with isolate_rng():
        contents = [fingerprint_bytes(dataset[index]) for index in fingerprint_indices(length)]
    return combine_fingerprint(length, contents)


def fingerprint_indices(length: int) -> list[int]:
    """Return the examples that the fingerprint of a data set is made of."""
    count = min(length, _FINGERPRINT_EXAMPLES)
    return [number * (length - 1) // max(count - 1, 1) for number in range(count)]


def combine_fingerprint(length: int, contents: Iterable[bytes]) -> str:
    """Return the fingerprint of a data set, from the contents of the examples at :func:`fingerprint_indices`."""
    digest = hashlib.sha256(str(length).encode())
    for content in contents:
        digest.update(content)
    return digest.hexdigest()[:16]


def fingerprint_bytes(item: Any) -> bytes:
    """Return bytes that are equal for equal examples: tensors and arrays by content, the rest by representation."""
    if isinstance(item, Tensor):
        return item.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(item, dict):
        return b"".join(repr(key).encode() + fingerprint_bytes(value) for key, value in item.items())
    if isinstance(item, (tuple, list)):
        return b"".join(fingerprint_bytes(value) for value in item)
    return item.tobytes() if hasattr(item, "tobytes") else repr(item).encode()
