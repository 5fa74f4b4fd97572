"""Sums as torch's optimizers compute them: bitwise identical if the scale is a number."""

from __future__ import annotations

import torch
from torch import Tensor

Scale = float | Tensor | bool
"""A hyperparameter, or a value computed from hyperparameters: a tensor if it differs between stacked runs."""


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
    """Return whether a hyperparameter is nonzero in any of the stacked runs."""
    return bool((value != 0).any()) if isinstance(value, Tensor) else value != 0


def scalar_dtype() -> torch.dtype:
    """Return the data type that torch's optimizers keep scalars in."""
    return torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32


def same_for_all(x: Tensor, dtype: torch.dtype) -> Scale:
    """Return the common value of all entries, or ``x`` in the given data type if stacked runs differ."""
    first = x.flatten()[0]
    return float(first) if bool((x == first).all()) else x.to(dtype)


def root(x: Tensor) -> Tensor:
    """Return the square root, with a derivative of 0 where ``x`` is 0.

    :func:`slope_of_root` explains why.
    """
    is_zero = x == 0
    return torch.where(is_zero, 0.0, torch.where(is_zero, 1.0, x).sqrt())


def slope_of_root(root: Tensor) -> Tensor:
    r"""Return the derivative :math:`1 / (2 \sqrt v)` of a second moment's root, or 0 where the root is 0.

    Automatic differentiation gives infinity there, and NaN for the update. But v is zero only if all gradients so far
    were zero. Then the numerator of the update is zero too, the update is linear in the gradient to first order, and
    the root contributes nothing to its derivative.
    """
    return torch.where(root == 0, 0.0, 0.5 / root)
