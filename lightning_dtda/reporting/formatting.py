"""Numbers of one column with a common power of ten, so that they can be compared at a glance."""

from __future__ import annotations

import math
from collections.abc import Iterable

MINUS = "\N{MINUS SIGN}"
_UNKNOWN = "\N{EN DASH}"
_DECIMALS = 3
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def common_exponent(values: Iterable[float]) -> int:
    """Return the power of ten, a multiple of three, in which the largest value has one to four digits.

    Example:
        >>> common_exponent([0.00042, -0.017]), common_exponent([0.3, 12.0]), common_exponent([])
        (-3, 0, 0)
    """
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    if largest == 0 or 1 <= largest < 10_000:
        return 0
    return 3 * math.floor(math.log10(largest) / 3)


def number(value: float, exponent: int = 0) -> str:
    """Return a value in units of a power of ten, with a true minus sign; a dash if it is unknown.

    Example:
        >>> number(-0.01234, -3), number(math.nan)
        ('−12.340', '–')
    """
    if not math.isfinite(value):
        return _UNKNOWN
    rounded = f"{value / 10**exponent:.{_DECIMALS}f}"
    return rounded.replace("-", MINUS) if float(rounded) else rounded.lstrip("-")


def unit(exponent: int) -> str:
    """Return the power of ten that a column's head states; nothing for one.

    Example:
        >>> unit(-3), unit(0)
        ('10⁻³', '')
    """
    return f"10{str(exponent).translate(_SUPERSCRIPT)}" if exponent else ""
