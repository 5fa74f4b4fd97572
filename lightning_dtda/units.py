"""Quantities as people give and read them."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

GIB = 2**30
"""Bytes in a GiB, the unit of the budgets that users give."""


def is_quantity(value: Any, whole: bool = False) -> bool:
    """Return whether a value is a finite number, or a whole one; truth values and text are none.

    Example:
        >>> [is_quantity(value) for value in (2, 0.5, True, float("nan"), "2", None)]
        [True, True, False, False, False, False]
    """
    if isinstance(value, Integral):
        return not isinstance(value, bool)
    return not whole and isinstance(value, Real) and math.isfinite(value)


def human_bytes(count: float) -> str:
    """Write a number of bytes with the unit that fits.

    Example:
        >>> human_bytes(600), human_bytes(3 * 2**20), human_bytes(5e9)
        ('0.6 KiB', '3.0 MiB', '4.7 GiB')
    """
    unit = next((unit for unit in (GIB, 2**20) if count >= unit), 2**10)
    return f"{count / unit:.1f} " + {GIB: "GiB", 2**20: "MiB", 2**10: "KiB"}[unit]


def human_seconds(seconds: float) -> str:
    """Write a duration with the unit that fits.

    Example:
        >>> human_seconds(0.42), human_seconds(42.3), human_seconds(300), human_seconds(1e4)
        ('0.4 s', '42 s', '5 min', '2.8 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 9.5 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
