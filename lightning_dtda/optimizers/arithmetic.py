"""Sums as torch's optimizers compute them: bitwise the same where a scale is a number."""

from __future__ import annotations

import torch
from torch import Tensor

Scale = float | Tensor | bool
"""A hyperparameter, or what is computed from hyperparameters: a tensor where stacked runs differ in it."""


def add_scaled(x: Tensor, y: Tensor, scale: Scale) -> Tensor:
    """Return ``x + scale * y``."""
    return x + scale * y if isinstance(scale, Tensor) else torch.add(x, y, alpha=scale)


def add_product(x: Tensor, y: Tensor, z: Tensor, scale: Scale) -> Tensor:
    """Return ``x + scale * y * z``."""
    return x + scale * (y * z) if isinstance(scale, Tensor) else torch.addcmul(x, y, z, value=scale)


def add_quotient(x: Tensor, y: Tensor, z: Tensor, scale: Scale) -> Tensor:
    """Return ``x + scale * y / z``."""
    return x + scale * (y / z) if isinstance(scale, Tensor) else torch.addcdiv(x, y, z, value=scale)


def is_nonzero(value: Scale) -> bool:
    """Whether a hyperparameter has any effect, in any of the stacked runs."""
    return bool((value != 0).any()) if isinstance(value, Tensor) else value != 0


def scalar_dtype() -> torch.dtype:
    """Return the data type in which torch's optimizers keep numbers."""
    return torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32


def same_for_all(x: Tensor, dtype: torch.dtype) -> Scale:
    """Return the number that all entries are; or ``x`` in a data type, where stacked runs differ."""
    first = x.flatten()[0]
    return float(first) if bool((x == first).all()) else x.to(dtype)


def root(x: Tensor) -> Tensor:
    """Return the square root; automatic differentiation then takes its slope for 0 where ``x`` is 0.

    The reason is that of :func:`slope_of_root`.
    """
    is_zero = x == 0
    return torch.where(is_zero, 0.0, torch.where(is_zero, 1.0, x).sqrt())


def slope_of_root(root: Tensor) -> Tensor:
    r"""Return the derivative :math:`1 / (2 \sqrt v)` of a second moment's root, and 0 where the root is 0.

    Automatic differentiation gives infinity there, and NaN for the update. But v is zero only where all gradients so
    far were: the numerator of the update is zero too, the update is linear in the gradient to first order, and the
    root contributes nothing to its derivative.
    """
    return torch.where(root == 0, 0.0, 0.5 / root)
