"""Validation of ``removed``: which removals are meant, and whether they can be made together."""

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
        raise AttributionError(f"There is no training example {outside[0]}; indices are 0 to {examples - 1}.")
    if len(set(indices)) != len(indices):
        twice = next(index for index in indices if indices.count(index) > 1)
        raise AttributionError(f"Training example {twice} is given twice. Give each example once.")
    return indices


def positions_of_groups(
    removed: Sequence[int | str], names: tuple[str, ...], members: tuple[tuple[int, ...], ...]
) -> list[int]:
    """Return the positions of the groups that are removed together.

    Args:
        removed: Names or positions of groups.
        names: Names of all groups.
        members: Indices of the examples of all groups.

    Raises:
        AttributionError: If a group does not exist, or two of them share an example.
    """
    if isinstance(removed, str):
        raise AttributionError(f"removed={removed!r} is a single name. Give a list, [{removed!r}].")
    known = {name: position for position, name in enumerate(names)}
    if isinstance(removed, (list, tuple)):
        if unknown := [name for name in removed if isinstance(name, str) and name not in known]:
            raise AttributionError(f"There is no group {unknown[0]!r}; the groups are {_some(names)}.")
        removed = [known[one] if isinstance(one, str) else one for one in removed]
    positions = _indices(removed, "groups")
    if outside := [position for position in positions if not 0 <= position < len(names)]:
        raise AttributionError(f"There is no group at position {outside[0]}; positions are 0 to {len(names) - 1}.")
    owners: dict[int, int] = {}
    for position in positions:
        for example in members[position]:
            if example in owners:
                raise AttributionError(
                    f"Groups {names[owners[example]]!r} and {names[position]!r} both contain training example "
                    f"{example}, which can be removed only once. Give groups that share no example."
                )
            owners[example] = position
    return positions


def _indices(removed: Any, what: str) -> list[int]:
    try:
        values = removed.tolist() if isinstance(removed, (Tensor, np.ndarray)) else list(removed)
        indices = [operator.index(value) for value in values]  # not int(), which would accept 1.5
    except TypeError as error:
        raise AttributionError(f"removed={removed!r} is not a list of the indices of {what}.") from error
    if any(isinstance(value, bool) for value in values):
        raise AttributionError(f"removed is a mask. Give the indices of the removed {what}.")
    return indices


def _some(names: tuple[str, ...], most: int = 10) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} others" if len(names) > most else "")
