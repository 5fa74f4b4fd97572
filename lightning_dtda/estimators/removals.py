"""Removals: each training example on its own, or groups of examples."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from lightning_dtda.errors import AttributionError
from lightning_dtda.replay import Examples

LEAVE_ONE_OUT = "leave-one-out"
"""Value that makes each training example its own removal."""

COLUMN = "column:"
"""Prefix of a key of the data set's items."""

_FORMS = (
    'Give "leave-one-out", a list of lists of indices, a mapping from names to lists of indices, a label for each '
    'example, or "column:KEY"'
)


@dataclass(frozen=True)
class Removals:
    r"""K removals of N training examples.

    Removing a group lowers the weights of its examples together, so its response is the sum of their responses:

    .. math:: r_k = -\sum_{n \in S_k} \frac{d\, m(\theta_T)}{d w_n}

    Args:
        examples: Number of training examples N.
        groups: Indices of each group's examples; ``None`` for leave-one-out: each example is its own removal, K = N.
        names: Names of the groups, in the same order.

    Raises:
        AttributionError: If a group is empty, contains an example twice or an index out of range, or has the name of
            another or one that is no text.

    Example:
        >>> removals = Removals(4, ((0, 2), (1,)), ("cats", "dogs"))
        >>> removals.total(torch.tensor([1.0, 10.0, 100.0, 1000.0]))
        tensor([101.,  10.])
    """

    examples: int
    groups: tuple[tuple[int, ...], ...] | None = None
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.groups is None:
            return
        if not self.groups:
            raise AttributionError(f"removals has no groups. {_FORMS}.")
        if len(self.names) != len(self.groups):
            raise AttributionError(
                f"There are {len(self.groups)} groups and {len(self.names)} names. Give one name for each group."
            )
        name, times = Counter(self.names).most_common(1)[0]
        if times > 1:
            raise AttributionError(f"{times} groups of removals are called {name!r}. Give each group a different name.")
        for name, group in zip(self.names, self.groups, strict=True):
            _check_group(name, group, self.examples)

    def __len__(self) -> int:
        return self.examples if self.groups is None else len(self.groups)

    @property
    def is_leave_one_out(self) -> bool:
        """Whether each example is its own removal."""
        return self.groups is None

    def content(self) -> str | list[dict[str, Any]]:
        """Return the removals in JSON types: ``"leave-one-out"``, or ``name`` and ``examples`` of each group."""
        if self.groups is None:
            return LEAVE_ONE_OUT
        return [{"name": name, "examples": list(group)} for name, group in zip(self.names, self.groups, strict=True)]

    def membership(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
        """Return a matrix ``(K, N)``, 1 where a removal contains an example and 0 elsewhere.

        For leave-one-out it is the N x N identity, which :meth:`total` avoids.
        """
        if self.groups is None:
            return torch.eye(self.examples, dtype=dtype, device=device)
        owners, members = self._pairs(device)
        membership = torch.zeros(len(self), self.examples, dtype=dtype, device=device)
        membership[owners, members] = 1
        return membership

    def total(self, responses: Tensor) -> Tensor:
        """Sum the responses of single examples ``(..., N)`` over each removal ``(..., K)``.

        For leave-one-out, returns the same tensor.
        """
        if self.groups is None:
            return responses
        owners, members = self._pairs(responses.device)
        totals = responses.new_zeros(*responses.shape[:-1], len(self))
        return totals.index_add_(-1, owners, responses.index_select(-1, members))

    def _pairs(self, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Return, for each example in each group, the group's position and the example."""
        assert self.groups is not None
        sizes = torch.tensor([len(group) for group in self.groups])
        owners = torch.arange(len(self.groups)).repeat_interleave(sizes)
        members = torch.tensor([index for group in self.groups for index in group])
        return owners.to(device), members.to(device)


def resolve_removals(removals: Any, examples: Examples) -> Removals:
    """Convert what a user gives as removals.

    Args:
        removals: One of

            - ``"leave-one-out"``;
            - a list of groups, each a list of indices of examples;
            - a mapping from names to such groups;
            - a label (integer or string) for each of the N examples, in a list, array or tensor: one group for each
              label, sorted by label;
            - ``"column:KEY"``, where KEY is the position or the key of such labels in the data set's items.
        examples: The N training examples.

    Raises:
        AttributionError: If ``removals`` is invalid or does not match the examples.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> examples = Examples(TensorDataset(torch.zeros(4, 2), torch.tensor([7, 5, 7, 5])))
        >>> resolve_removals("column:1", examples)
        Removals(examples=4, groups=((1, 3), (0, 2)), names=('5', '7'))
        >>> resolve_removals([[0, 1, 2], [3]], examples).names
        ('0', '1')
    """
    if isinstance(removals, Removals):
        if removals.examples != len(examples):
            raise AttributionError(
                f"The removals are for {removals.examples} examples, but there are {len(examples)} training examples. "
                "Create them for these data."
            )
        return removals
    if isinstance(removals, str):
        if removals == LEAVE_ONE_OUT:
            return Removals(len(examples))
        if removals.startswith(COLUMN):
            try:
                labels = examples.column(removals.removeprefix(COLUMN))
            except LookupError as error:
                raise AttributionError(f"removals={removals!r}: {error.args[0]}") from error
            return _by_label(labels, f"removals={removals!r}", len(examples))
        raise AttributionError(f"removals={removals!r}. {_FORMS}.")
    if isinstance(removals, Mapping):
        groups = tuple(_indices(group, f"group {str(name)!r}") for name, group in removals.items())
        return Removals(len(examples), groups, tuple(str(name) for name in removals))
    given = _listed(removals)
    if any(map(_is_group, given)):
        if not all(map(_is_group, given)):
            lone = next(value for value in given if not _is_group(value))
            raise AttributionError(
                f"removals mixes groups with {lone!r}, which is not a group. Give only lists of indices (a group of "
                f"one is [{lone!r}]), or a label for each example."
            )
        groups = tuple(_indices(group, f"group {number}") for number, group in enumerate(given))
        return Removals(len(examples), groups, tuple(str(number) for number in range(len(groups))))
    return _by_label(given, "removals", len(examples))


def _check_group(name: str, group: tuple[int, ...], examples: int) -> None:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise AttributionError(
            f"The name {name!r} of a group of removals holds half of a surrogate pair, which is no text. Rename it."
        ) from None
    if not group:
        raise AttributionError(f"Group {name!r} of removals is empty. Leave it out, or give it an example.")
    if outside := [index for index in group if not 0 <= index < examples]:
        raise AttributionError(
            f"Group {name!r} of removals has the index {outside[0]}; valid indices are 0 to {examples - 1}."
        )
    if len(set(group)) != len(group):
        index = Counter(group).most_common(1)[0][0]
        raise AttributionError(f"Group {name!r} of removals contains example {index} twice. Give each index once.")


def _listed(removals: Any) -> list[Any]:
    """Return the given elements as a list, with numbers from tensors and arrays as Python numbers."""
    if hasattr(removals, "tolist"):
        if getattr(removals, "ndim", 1) != 1:
            raise AttributionError(
                f"removals has shape {tuple(removals.shape)}. Give labels in one dimension, one for each example, or "
                "a list of lists of indices."
            )
        return list(removals.tolist())
    if not isinstance(removals, Iterable):
        raise AttributionError(f"removals={removals!r}. {_FORMS}.")
    return [value.item() if getattr(value, "ndim", None) == 0 else value for value in removals]


def _is_group(value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, (str, bytes))


def _indices(group: Any, where: str) -> tuple[int, ...]:
    values = group.tolist() if hasattr(group, "tolist") else group
    try:
        indices = tuple(operator.index(value) for value in values)  # int() would accept 1.5
    except TypeError as error:
        raise AttributionError(
            f"removals, {where}: {group!r} is not a list of indices of training examples."
        ) from error
    if any(isinstance(value, bool) for value in values):
        raise AttributionError(f"removals, {where}: this is a mask. Give the indices of the examples instead.")
    return indices


def _by_label(labels: Sequence[Any], where: str, examples: int) -> Removals:
    """Return one group for each label, sorted by label."""
    if len(labels) != examples:
        raise AttributionError(
            f"{where} has {len(labels)} labels for {examples} training examples. Give one label for each example, or, "
            "for a single group, a list in a list: [[3, 17]]."
        )
    for number, label in enumerate(labels):
        if isinstance(label, bool) or not isinstance(label, (Integral, str)):
            raise AttributionError(
                f"{where}: the label of example {number} is {label!r}, a {type(label).__name__}. Labels must be "
                "integers or strings; give other groups as a mapping from names to lists of indices."
            )
    if len({isinstance(label, str) for label in labels}) > 1:
        raise AttributionError(f"{where}: some labels are integers and others are strings. Give labels of one type.")
    members: dict[Any, list[int]] = {label: [] for label in sorted(set(labels))}
    for number, label in enumerate(labels):
        members[label].append(number)
    return Removals(examples, tuple(map(tuple, members.values())), tuple(map(str, members)))
