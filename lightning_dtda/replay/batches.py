"""Batches as collections of stacked tensors: the first dimension of every leaf runs over examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from lightning_dtda.errors import ReplayError


def map_tensors(function: Callable[[Tensor], Tensor], batch: Any) -> Any:
    """Apply a function to every tensor of a batch."""
    return tree_map(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, batch)


def rows_of(batch: Any) -> int:
    """Return B, the number of examples in a batch.

    Raises:
        ReplayError: If a leaf is no tensor, or the leaves disagree about the number of examples.
    """
    leaves, _ = tree_flatten(batch)
    if not leaves or not all(isinstance(leaf, Tensor) and leaf.ndim > 0 for leaf in leaves):
        kinds = sorted({type(leaf).__name__ for leaf in leaves if not isinstance(leaf, Tensor)}) or ["0-d tensors"]
        raise ReplayError(
            "A batch must consist of tensors whose first dimension runs over its examples; this one holds "
            f"{', '.join(kinds)}. Let the collate_fn return tensors only."
        )
    lengths = {leaf.shape[0] for leaf in leaves}
    if len(lengths) != 1:
        raise ReplayError(
            f"The tensors of a batch have first dimensions {sorted(lengths)}; it must be the number of examples in "
            "each of them. Let the collate_fn stack per-example tensors."
        )
    return int(lengths.pop())


def concatenate(batches: Sequence[Any]) -> Any:
    """Join batches along the examples.

    Raises:
        ReplayError: If they differ in structure or in the shape of an example.
    """
    flattened = [tree_flatten(batch) for batch in batches]
    try:
        leaves = [torch.cat(parts) for parts in zip(*(leaves for leaves, _ in flattened), strict=True)]
    except (RuntimeError, ValueError, TypeError) as error:
        raise ReplayError(
            f"The examples do not have one shape, so that they cannot be stacked ({error}). Pad them in the data set."
        ) from error
    return tree_unflatten(leaves, flattened[0][1])


def example_shapes(batch: Any) -> list[tuple[int, ...]]:
    """Return the shape of one example in each leaf."""
    return [tuple(leaf.shape[1:]) for leaf in tree_flatten(batch)[0]]
