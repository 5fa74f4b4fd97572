"""Formatting of numbers and names. Numbers in a column share a power of ten, so they can be compared at a glance."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from rich import markup

from lightning_dtda.text import printable

MINUS = "\N{MINUS SIGN}"
_UNKNOWN = "\N{EN DASH}"
_DECIMALS = 3
_MOST_COUNTED = 100_000
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def escape(text: str) -> str:
    r"""Escape a text that may have names from files, for rich to print it as it is.

    Example:
        >>> print(escape("[bold] and \x1b[2J"))
        \[bold] and \x1b[2J
    """
    return markup.escape(printable(text))


def common_exponent(values: Iterable[float]) -> int:
    """Return the power of ten, a multiple of three, at which the largest value has one to four digits.

    Example:
        >>> common_exponent([0.00042, -0.017]), common_exponent([0.3, 12.0]), common_exponent([])
        (-3, 0, 0)
    """
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    if largest == 0 or 1 <= largest < 10_000:
        return 0
    return 3 * math.floor(math.log10(largest) / 3)


def number(value: float, exponent: int = 0) -> str:
    """Format a value in units of a power of ten, with a true minus sign; a dash if it is unknown.

    Example:
        >>> number(-0.01234, -3), number(math.nan)
        ('−12.340', '–')
    """
    if not math.isfinite(value):
        return _UNKNOWN
    rounded = f"{value / 10**exponent:.{_DECIMALS}f}"
    return rounded.replace("-", MINUS) if float(rounded) else rounded.lstrip("-")


def supported(value: float, low: float, high: float) -> tuple[str, str, str]:
    """Format a value and the ends of its interval, with the digits that the interval supports.

    They end at the first digit of half its width, or at the second if the first is a one. Without an interval, the
    value has three digits, and the ends are dashes.

    Example:
        >>> supported(0.123456, 0.0512, 0.1957), supported(-1234.5, -1350.0, -1120.0), supported(0.123456, math.nan, 1)
        (('0.12', '0.05', '0.20'), ('−1230', '−1350', '−1120'), ('0.123', '–', '–'))
    """
    width = (high - low) / 2
    if not (math.isfinite(width) and width > 0):
        return (f"{value:.3g}".replace("-", MINUS) if math.isfinite(value) else _UNKNOWN), _UNKNOWN, _UNKNOWN
    magnitude = math.floor(math.log10(width))
    decimals = (width < 2 * 10**magnitude) - magnitude
    rounded = (f"{round(each, decimals):.{max(decimals, 0)}f}" for each in (value, low, high))
    first, second, third = (text.replace("-", MINUS) if float(text) else text.lstrip("-") for text in rounded)
    return first, second, third


def unit(exponent: int) -> str:
    """Format a power of ten for a column's head; an empty text if it is one.

    Example:
        >>> unit(-3), unit(0)
        ('in 10⁻³', '')
    """
    return f"in 10{str(exponent).translate(_SUPERSCRIPT)}" if exponent else ""


def capital(text: str) -> str:
    """Return a text with a capital first letter.

    Example:
        >>> capital("mean influence")
        'Mean influence'
    """
    return text[:1].upper() + text[1:]


def p_value(value: float) -> str:
    """Format a p-value; a dash if it is unknown.

    Example:
        >>> p_value(0.0321), p_value(4.2e-8), p_value(math.nan)
        ('0.032', '< 0.0001', '–')
    """
    if not math.isfinite(value):
        return _UNKNOWN
    return "< 0.0001" if value < 1e-4 else f"{value:.2g}" if value < 0.995 else "1"


def count(value: float, rounded: Callable[[float], int] = math.ceil) -> str:
    """Format a number of trainings to two digits, cut off where nobody would train.

    Example:
        >>> count(1234.0), count(1234.0, math.floor), count(17.0), count(3e7)
        ('1,300', '1,200', '17', 'more than 100,000')
    """
    if value > _MOST_COUNTED:
        return f"more than {_MOST_COUNTED:,}"
    return f"{two_digits(value, rounded):,}"


def two_digits(value: float, rounded: Callable[[float], int] = math.ceil) -> int:
    """Round a number of trainings to two digits.

    Example:
        >>> two_digits(1234.0), two_digits(17.2)
        (1300, 18)
    """
    step = 10 ** max(math.floor(math.log10(max(value, 1))) - 1, 0)
    return rounded(value / step) * step


def counts(low: float, high: float) -> str:
    """Format a range of numbers of trainings; a dash if it is unknown.

    Example:
        >>> counts(12.0, 61.0), counts(12.0, math.inf), counts(4.0, 4.0), counts(math.nan, math.nan)
        ('12 to 61', 'at least 12', '4', '–')
    """
    if math.isnan(low):
        return _UNKNOWN
    if low > _MOST_COUNTED:
        return count(low)
    if high > _MOST_COUNTED:
        return f"at least {count(low, math.floor)}"
    return count(low) if low == high else f"{count(low, math.floor)} to {count(high)}"
