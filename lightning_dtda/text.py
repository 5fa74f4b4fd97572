"""Text for people: safe to print in a terminal, and with a suggestion where a name is misspelt."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters except tab and newline; characters that change the direction of text; undecodable bytes."""


def printable(text: str) -> str:
    r"""Escape the characters by which a name could control a terminal, or that cannot be written to it.

    Names of groups, runs, queries and classes come from files that others may have written.

    Example:
        >>> print(printable("group \x1b[2J"))
        group \x1b[2J
    """
    return _UNPRINTABLE.sub(lambda found: ascii(found.group())[1:-1], text)


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Return a question that suggests the choice most like a misspelt name, to append to an error; empty if none is.

    Example:
        >>> did_you_mean("varience", ["mean", "variance"])
        ' Did you mean variance?'
    """
    close = difflib.get_close_matches(name, list(choices), n=1)
    return f" Did you mean {close[0]}?" if close else ""
