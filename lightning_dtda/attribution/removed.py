"""Which removals a caller means, and whether they can be made together."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from lightning_dtda.errors import AttributionError


def positions_of_examples(removed: Sequence[int | str], examples: int) -> list[int]:
    """Return the indices of the examples that are removed together.

    Raises:
        AttributionError: If an index is out of range or given twice.
    """
    indices = _indices(removed, "training examples")
    if outside := [index for index in indices if not 0 <= index < examples]:
        raise AttributionError(f"There is no training example {outside[0]}; they are 0 to {examples - 1}.")
    if len(set(indices)) != len(indices):
        twice = next(index for index in indices if indices.count(index) > 1)
        raise AttributionError(f"Training example {twice} is given twice; it can be removed once.")
    return indices


def positions_of_groups(
    removed: Sequence[int | str], names: tuple[str, ...], members: tuple[tuple[int, ...], ...]
) -> list[int]:
    """Return the positions of the groups that are removed together.

    Args:
        removed: Names or positions of groups.
        names: Of all groups.
        members: Of all groups, the indices of their examples.

    Raises:
        AttributionError: If there is no such group, or two of them share an example.
    """
    if isinstance(removed, str):
        raise AttributionError(f"removed={removed!r} is a single name. Give a list, [{removed!r}].")
    known = {name: position for position, name in enumerate(names)}
    if isinstance(removed, (list, tuple)):
        if unknown := [name for name in removed if isinstance(name, str) and name not in known]:
            raise AttributionError(f"There is no group {unknown[0]!r} of removals; they are {_some(names)}.")
        removed = [known[one] if isinstance(one, str) else one for one in removed]
    positions = _indices(removed, "groups")
    if outside := [position for position in positions if not 0 <= position < len(names)]:
        raise AttributionError(f"There is no group at position {outside[0]}; they are 0 to {len(names) - 1}.")
    owners: dict[int, int] = {}
    for position in positions:
        for example in members[position]:
            if example in owners:
                raise AttributionError(
                    f"Groups {names[owners[example]]!r} and {names[position]!r} both have training example {example}; "
                    "it can be removed once. Give groups that share no example."
                )
            owners[example] = position
    return positions


def _indices(removed: Any, what: str) -> list[int]:
    try:
        values = removed.tolist() if isinstance(removed, (Tensor, np.ndarray)) else list(removed)
        indices = [operator.index(value) for value in values]  # not int(): 1.5 is no index
    except TypeError as error:
        raise AttributionError(f"removed={removed!r} is no list of the indices of {what}.") from error
    if any(isinstance(value, bool) for value in values):
        raise AttributionError(f"removed is a mask. Give the indices of the removed {what}.")
    return indices


def _some(names: tuple[str, ...], most: int = 10) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} others" if len(names) > most else "")
