"""Training examples and queries, fetched by index as the training saw them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, default_collate

from lightning_dtda.errors import AttributionError, ReplayError
from lightning_dtda.replay.batches import concatenate, example_shapes, map_tensors, rows_of

_COLLATE_CHUNK = 256
"""Examples collated at a time while a data set is stacked: bounds the memory of the Python objects."""

_ARRAYS = (Tensor, np.ndarray, np.generic)

_STACK_LIMIT = 2 * 2**30
"""Bytes up to which a data set is held stacked in memory; a larger one is fetched and collated step by step."""


class Examples:
    """A map-style data set as stacked tensors.

    Args:
        dataset: Any map-style data set whose items always are the same.
        collate_fn: What makes a batch of a list of items; the DataLoader's own.
        dtype: Pairs (recorded, wanted): floating point tensors of the first are cast to the second, for a replay in
            another precision than the training's.
        device: Where batches are put.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> examples = Examples(TensorDataset(torch.arange(6.0).reshape(3, 2), torch.arange(3)))
        >>> examples.fetch(torch.tensor([2, 0]))
        [tensor([[4., 5.],
                [0., 1.]]), tensor([2, 0])]
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        collate_fn: Callable[[list[Any]], Any] = default_collate,
        *,
        dtype: tuple[torch.dtype, torch.dtype] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            raise AttributionError(
                f"{type(dataset).__name__} has no indices. Attribution needs a map-style data set (__getitem__ and "
                "__len__), since removal is of examples by index."
            )
        self.dataset = dataset
        self._collate = collate_fn
        self._dtype = dtype
        self._device = torch.device(device)
        self._stacked: Any = None
        self._checked = False
        self._template: Any = None

    def __len__(self) -> int:
        return len(self.dataset)

    def to(self, dtype: tuple[torch.dtype, torch.dtype], device: torch.device | str) -> Examples:
        """Return the same examples, cast and moved."""
        return Examples(self.dataset, self._collate, dtype=dtype, device=device)

    def fetch(self, indices: Tensor) -> Any:
        """Return the examples at ``indices`` of any shape: each leaf gets shape ``(*indices.shape, *example)``."""
        if not self._checked:
            self._stacked = self._stack() if self._bytes() <= _STACK_LIMIT else None
            self._checked = True
        if self._stacked is not None:
            where = indices.to(self._device)
            return map_tensors(lambda leaf: leaf[where], self._stacked)
        batch = self._prepare(self._collated(indices.flatten().tolist()))
        return map_tensors(lambda leaf: leaf.reshape(*indices.shape, *leaf.shape[1:]), batch)

    def column(self, key: str) -> list[Any]:
        """Return what every item of the data set has at a key of it, a tuple's position or a dictionary's key.

        Numbers are Python's own, also those of a tensor or an array of one.

        Raises:
            LookupError: If the items have no such key; the message says which they have.
        """
        with isolate_rng():  # items may be random
            values = [_entry(self.dataset[index], key) for index in range(len(self))]
        return [
            value.item() if isinstance(value, _ARRAYS) and math.prod(value.shape) == 1 else value for value in values
        ]

    def restore(self, leaves: Sequence[Tensor]) -> Any:
        """Return stored tensors of batches, each ``(..., *example)``, in the structure of a batch of this data set.

        Raises:
            ReplayError: If its batches consist of other tensors.
        """
        if self._template is None:
            with isolate_rng():
                self._template = self._collated([0])
        wanted, structure = tree_flatten(self._template)
        found = [tuple(leaf.shape[leaf.ndim - one.ndim + 1 :]) for leaf, one in zip(leaves, wanted, strict=False)]
        if len(leaves) != len(wanted) or found != example_shapes(self._template):
            raise ReplayError(
                f"The stored batches hold {len(leaves)} tensors, of shapes {found} for an example; those of the data "
                f"hold {len(wanted)}, of shapes {example_shapes(self._template)}. Give the data that were trained on."
            )
        return self._prepare(tree_unflatten(list(leaves), structure))

    def all(self) -> Any:
        """Return every example as one batch."""
        return self.fetch(torch.arange(len(self)))

    def _bytes(self) -> int:
        leaves, _ = tree_flatten(self._collated([0]))
        return sum(leaf.numel() * leaf.element_size() for leaf in leaves if isinstance(leaf, Tensor)) * len(self)

    def _stack(self) -> Any:
        chunks = torch.arange(len(self)).split(_COLLATE_CHUNK)
        return self._prepare(concatenate([self._collated(chunk.tolist()) for chunk in chunks]))

    def _collated(self, indices: list[int]) -> Any:
        batch = self._collate([self.dataset[index] for index in indices])
        rows_of(batch)
        return batch

    def _prepare(self, batch: Any) -> Any:
        def prepare(leaf: Tensor) -> Tensor:
            wanted = self._dtype[1] if self._dtype is not None and leaf.dtype == self._dtype[0] else leaf.dtype
            return leaf.to(self._device, wanted)

        return map_tensors(prepare, batch)


def training_examples(data: LightningDataModule | LightningModule | DataLoader[Any] | Dataset[Any]) -> Examples:
    """Return the training examples of a data module, a module with its own loader, a DataLoader or a Dataset.

    Raises:
        AttributionError: If ``data`` is none of these.
    """
    if isinstance(data, (LightningDataModule, LightningModule)):
        prepare_fit(data)
        data = data.train_dataloader()
    return _examples(data, "data")


def query_examples(queries: DataLoader[Any] | Dataset[Any]) -> Examples:
    """Return the queries of a Dataset or a DataLoader, in the data set's order.

    Raises:
        AttributionError: If ``queries`` is neither, or is empty.
    """
    examples = _examples(queries, "queries")
    if not len(examples):
        raise AttributionError("There are no queries. Give a data set with at least one example.")
    return examples


def query_names(queries: Examples) -> tuple[int, ...]:
    """Return what queries are called: their indices in the data set that they are a ``Subset`` of, or their numbers."""
    dataset = queries.dataset
    return tuple(int(i) for i in dataset.indices) if isinstance(dataset, Subset) else tuple(range(len(queries)))


def prepare_fit(data: LightningDataModule | LightningModule) -> None:
    """Do what the Trainer does before it asks a data module for its loaders."""
    data.prepare_data()
    data.setup("fit")


def _entry(item: Any, key: str) -> Any:
    """Return what an item has at a key, given as text."""
    if isinstance(item, Mapping):
        for known in item:
            if str(known) == key:
                return item[known]
        raise LookupError(f"the items have no key {key!r}. Choose from {', '.join(map(str, item))}.")
    if not isinstance(item, (tuple, list)):
        raise LookupError(
            f"the items are {type(item).__name__}, neither tuples nor dictionaries. Give a label for each example."
        )
    if not (key.isdecimal() and int(key) < len(item)):
        raise LookupError(f"the items have no position {key!r}. Choose from 0 to {len(item) - 1}.")
    return item[int(key)]


def _examples(source: Any, argument: str) -> Examples:
    if isinstance(source, DataLoader):
        return Examples(source.dataset, source.collate_fn)
    if hasattr(source, "__getitem__") and hasattr(source, "__len__") and not isinstance(source, (list, tuple, dict)):
        return Examples(source)
    raise AttributionError(
        f"{argument} is a {type(source).__name__}. Give a Dataset or one DataLoader"
        + (" or a LightningDataModule with one training DataLoader." if argument == "data" else ".")
    )
