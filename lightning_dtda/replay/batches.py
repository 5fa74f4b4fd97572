"""Batches of any structure: tensors in collections or in objects of arbitrary classes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lightning_dtda.compatibility import tree_flatten, tree_map


def converted(batch: Any, dtype: torch.dtype) -> Any:
    """Cast all floating-point tensors of a batch, at any depth, to a data type."""
    return _mapped(lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf, batch)


def _mapped(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, PackedSequence):
        return value._replace(data=function(value.data))
    if isinstance(value, Mapping):
        parts = {key: _mapped(function, part) for key, part in value.items()}
        if type(value) is dict:
            return parts
        found = copy.copy(value)  # a custom mapping may hold more than its entries
        for key, part in parts.items():
            found[key] = part  # type: ignore[index]
        return found
    if isinstance(value, (list, tuple)):
        parts_of = [_mapped(function, part) for part in value]
        return type(value)(*parts_of) if hasattr(value, "_fields") else type(value)(parts_of)
    if (
        callable(own := getattr(value, "apply", None))
        and hasattr(value, "to")
        and not isinstance(value, torch.nn.Module)
    ):
        return own(function)  # PyTorch Geometric batches
    attributes = getattr(value, "__dict__", None)
    if not isinstance(attributes, dict) or isinstance(value, (type, torch.nn.Module)):
        return value
    mapped = {name: _mapped(function, part) for name, part in attributes.items()}
    if all(mapped[name] is part for name, part in attributes.items()):
        return value
    moved = copy.copy(value)
    moved.__dict__.update(mapped)
    return moved


def map_tensors(function: Callable[[Tensor], Tensor], batch: Any) -> Any:
    """Apply a function to every tensor in a collection."""
    return tree_map(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, batch)


def rows_of(batch: Any) -> int | None:
    """Return the batch size B if the batch consists of tensors with a common first dimension, else ``None``."""
    leaves, _ = tree_flatten(batch)
    if not leaves or not all(isinstance(leaf, Tensor) and leaf.ndim > 0 for leaf in leaves):
        return None
    lengths = {leaf.shape[0] for leaf in leaves}
    return int(lengths.pop()) if len(lengths) == 1 else None


def stack_leaves(batches: Sequence[Any]) -> list[Tensor] | None:
    """Stack the tensors of batches, each ``(batches, ...)``; ``None`` if the batches differ in structure or shapes."""
    leaves, structures = zip(*map(tree_flatten, batches), strict=True)
    if any(structure != structures[0] for structure in structures):
        return None
    columns = list(zip(*leaves, strict=True))
    alike = all(isinstance(leaf, Tensor) and leaf.shape == column[0].shape for column in columns for leaf in column)
    return [torch.stack(column) for column in columns] if alike else None


def example_types(batch: Any) -> list[str]:
    """Return data type and shape of one example in each tensor of a batch, such as ``"torch.float32 (8,)"``."""
    return [f"{leaf.dtype} {tuple(leaf.shape[1:])}" for leaf in tree_flatten(batch)[0]]
