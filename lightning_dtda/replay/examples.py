"""Training examples and queries, fetched by index as the training saw them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, default_collate

from lightning_dtda.compatibility import is_a, kinds
from lightning_dtda.errors import AttributionError, ReplayError
from lightning_dtda.replay.batches import example_shapes
from lightning_dtda.replay.fingerprint import reader, refuse_changed_data
from lightning_dtda.trajectory import Run

_COLLATE_CHUNK = 256
"""Examples collated at a time while a data set is stacked: bounds the memory of the Python objects."""

_ARRAYS = (Tensor, np.ndarray, np.generic)

_TABLE_LIMIT = 2 * 2**30
"""Bytes up to which a data set is held stacked in memory; a larger one is fetched and collated step by step."""


class Examples:
    """A map-style data set, and how batches are made of its examples.

    Args:
        dataset: Any map-style data set whose items always are the same.
        collate_fn: What makes a batch of a list of items; the DataLoader's own.
        loader: The DataLoader, whose workers read the examples; ``None`` reads them in this process.
        datamodule: Whose hooks batches pass on their way to the module; ``None`` where there is none.
        takes_lists: Whether the data set is asked for whole batches, as the loader's is if its ``batch_size`` is
            ``None``.
        first: Number of the first of them, where they are a stretch of others.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> examples = Examples(TensorDataset(torch.arange(6.0).reshape(3, 2), torch.arange(3)))
        >>> examples.collated([2, 0])
        [tensor([[4., 5.],
                [0., 1.]]), tensor([2, 0])]
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        collate_fn: Callable[[list[Any]], Any] = default_collate,
        loader: DataLoader[Any] | None = None,
        datamodule: LightningDataModule | None = None,
        takes_lists: bool = False,
        first: int = 0,
    ) -> None:
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            raise AttributionError(
                f"{type(dataset).__name__} has no indices. Attribution needs a map-style data set (__getitem__ and "
                "__len__), since removal is of examples by index."
            )
        self.dataset = dataset
        self.collate_fn = collate_fn
        self.datamodule = datamodule
        self.first = first
        self._loader = loader
        self.takes_lists = takes_lists or (loader is not None and loader.batch_sampler is None)
        """Whether the data set is asked for whole batches, by lists of indices (``batch_size=None``)."""
        self._compared: set[int] = set()

    def __len__(self) -> int:
        return len(self.dataset)

    def stretch(self, numbers: range) -> Examples:
        """Return some examples that follow each other."""
        some, first = Subset(self.dataset, numbers), self.first + numbers.start
        return Examples(some, self.collate_fn, self._loader, self.datamodule, self.takes_lists, first)

    def collated(self, indices: Sequence[int]) -> Any:
        """Return the batch of some examples."""
        if self._table is not None:
            leaves, structure = self._table
            where = torch.as_tensor(indices)
            return tree_unflatten([leaf[where] for leaf in leaves], structure)
        return self._untabled(list(indices))

    @property
    def reads_ahead(self) -> bool:
        """Whether workers are to read batches ahead, as in the training."""
        return self._has_workers and self._table is None

    @property
    def _has_workers(self) -> bool:
        return self._loader is not None and self._loader.num_workers > 0

    def batches(self, indices: Sequence[list[int]]) -> Iterator[Any]:
        """Yield the batches of some lists of examples, read by the workers of the training."""
        return reader(self.dataset, self._loader, indices, self.collate_fn, as_trained=True, ahead=True)

    def tensors(self, indices: Tensor | slice) -> list[Tensor] | None:
        """Return the tensors of batches of examples ``(runs, B)``, each ``(runs, B, ...)``; a slice is of one batch.

        ``None`` where batches are not made by stacking tensors.
        """
        return None if self._table is None else [leaf[indices] for leaf in self._table[0]]

    @cached_property
    def _table(self) -> tuple[list[Tensor], TreeSpec] | None:
        """All examples, stacked; ``None`` where they are not tensors of one shape, or too many to be held."""
        if self.collate_fn is not default_collate or self.takes_lists or not len(self):
            return None
        with isolate_rng():  # items may be random
            # twice the same, so that what an item holds cannot be taken for the dimension over examples
            first, structure = tree_flatten(self._untabled([0, 0]))
            if not all(isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == 2 for leaf in first):
                return None
            if sum(leaf[0].nbytes for leaf in first) * len(self) > _TABLE_LIMIT:
                return None
            chunks = [chunk.tolist() for chunk in torch.arange(len(self)).split(_COLLATE_CHUNK)]
            try:
                read = self.batches(chunks) if self._has_workers else map(self._untabled, chunks)
                parts = [tree_flatten(batch)[0] for batch in read]
                return [torch.cat(leaves) for leaves in zip(*parts, strict=True)], structure
            except (RuntimeError, ValueError, TypeError):
                return None  # the examples have not all one shape, so that some cannot be in one batch

    def _untabled(self, indices: list[int]) -> Any:
        if self.takes_lists:
            return self.collate_fn(self.dataset[indices])
        if hasattr(self.dataset, "__getitems__"):
            return self.collate_fn(self.dataset.__getitems__(indices))
        return self.collate_fn([self.dataset[index] for index in indices])

    def refuse_changes(self, run: Run) -> None:
        """Refuse data that are not those that a run was trained on; runs that recorded the same are compared once.

        Raises:
            ReplayError: Naming the examples.
        """
        recorded = 0 if run.manifest.examples is None else run.manifest.examples["crc32"]
        if recorded not in self._compared:
            refuse_changed_data(run, self.dataset, self._loader)
        if recorded:
            self._compared.add(recorded)

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
        """Return stored tensors of batches, each ``(B, ...)``, in the structure of a batch of this data set.

        Raises:
            ReplayError: If its batches consist of other tensors.
        """
        wanted, structure = tree_flatten(self._template)
        found = [tuple(leaf.shape[1:]) for leaf in leaves]
        if len(leaves) != len(wanted) or found != example_shapes(self._template):
            raise ReplayError(
                f"The stored batches hold {len(leaves)} tensors, of shapes {found} for an example; those of the data "
                f"hold {len(wanted)}, of shapes {example_shapes(self._template)}. Give the data that were trained on."
            )
        return tree_unflatten(list(leaves), structure)

    @cached_property
    def _template(self) -> Any:
        with isolate_rng():
            return self._untabled([0])


def training_examples(data: LightningDataModule | LightningModule | DataLoader[Any] | Dataset[Any]) -> Examples:
    """Return the training examples of a data module, a module with its own loader, a DataLoader or a Dataset.

    Raises:
        AttributionError: If ``data`` is none of these.
    """
    if isinstance(data, kinds("LightningDataModule", "LightningModule")):
        source: Any = data
        prepare_fit(source)
        datamodule = source if is_a(source, "LightningDataModule") else None
        return _examples(source.train_dataloader(), "data", datamodule)
    return _examples(data, "data")


def query_examples(queries: DataLoader[Any] | Dataset[Any], training: Examples | None = None) -> Examples:
    """Return the queries of a Dataset or a DataLoader, in the data set's order.

    Args:
        queries: The queries.
        training: The training examples, whose ``collate_fn`` is that of a Dataset of queries too.

    Raises:
        AttributionError: If ``queries`` is neither, or is empty.
    """
    examples = _examples(queries, "queries", like=training)
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


def _examples(
    source: Any,
    argument: str,
    datamodule: LightningDataModule | None = None,
    like: Examples | None = None,
) -> Examples:
    if isinstance(source, DataLoader):
        return Examples(source.dataset, source.collate_fn, source, datamodule)
    if hasattr(source, "__getitem__") and hasattr(source, "__len__") and not isinstance(source, (list, tuple, dict)):
        return Examples(source) if like is None else Examples(source, like.collate_fn, takes_lists=like.takes_lists)
    raise AttributionError(
        f"{argument} is a {type(source).__name__}. Give a Dataset or one DataLoader"
        + (" or a LightningDataModule with one training DataLoader." if argument == "data" else ".")
    )
