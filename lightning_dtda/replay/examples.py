"""Training examples and queries, fetched by index in the form in which the training saw them."""

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
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, default_collate

from lightning_dtda.compatibility import TreeSpec, is_a, kinds, tree_flatten, tree_unflatten
from lightning_dtda.errors import AttributionError, ReplayError
from lightning_dtda.replay.batches import example_types
from lightning_dtda.replay.fingerprint import reader, refuse_changed_data
from lightning_dtda.trajectory import Run

_COLLATE_CHUNK = 256
"""Number of examples to collate at a time while stacking a data set; bounds the memory of the Python objects."""

_ARRAYS = (Tensor, np.ndarray, np.generic)

_TABLE_LIMIT = 2 * 2**30
"""Maximum size in bytes of a data set held stacked in memory; a larger one is fetched and collated step by step."""


class Examples:
    """A map-style data set, and how its examples are collated into batches.

    Args:
        dataset: Any map-style data set that always returns the same items.
        collate_fn: Function that collates a list of items into a batch, usually that of the DataLoader.
        loader: DataLoader whose workers read the examples; ``None`` to read them in this process.
        datamodule: Data module whose hooks are applied to batches on their way to the module, if there is one.
        takes_lists: Whether the data set returns whole batches, given a list of indices. Always true if the
            ``batch_size`` of the loader is ``None``.
        first: Position of the first example in the whole, if these examples are a contiguous part of it.

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
                f"{type(dataset).__name__} has no indices. Attribution removes examples by index, so it needs a "
                "map-style data set (with __getitem__ and __len__)."
            )
        self.dataset = dataset
        self.collate_fn = collate_fn
        self.datamodule = datamodule
        self.first = first
        self._loader = loader
        self.takes_lists = takes_lists or (loader is not None and loader.batch_sampler is None)
        """Whether the data set returns whole batches, given a list of indices (``batch_size=None``)."""
        self._compared: set[int] = set()

    def __len__(self) -> int:
        return len(self.dataset)

    def stretch(self, numbers: range) -> Examples:
        """Return a contiguous part of the examples."""
        some, first = Subset(self.dataset, numbers), self.first + numbers.start
        return Examples(some, self.collate_fn, self._loader, self.datamodule, self.takes_lists, first)

    def collated(self, indices: Sequence[int]) -> Any:
        """Return the examples at these indices as a batch."""
        if self._table is not None:
            leaves, structure = self._table
            where = torch.as_tensor(indices)
            return tree_unflatten([leaf[where] for leaf in leaves], structure)
        return self._untabled(list(indices))

    @property
    def reads_ahead(self) -> bool:
        """Whether workers read batches ahead, as in the training."""
        return self._has_workers and self._table is None

    @property
    def _has_workers(self) -> bool:
        return self._loader is not None and self._loader.num_workers > 0

    def batches(self, indices: Sequence[list[int]]) -> Iterator[Any]:
        """Yield a batch for each list of indices, read by DataLoader workers if the training used them."""
        return reader(self.dataset, self._loader, indices, self.collate_fn, as_trained=True, ahead=True)

    def tensors(self, indices: Tensor | slice) -> list[Tensor] | None:
        """Return the tensors of batches at indices ``(runs, B)``, each ``(runs, B, ...)``; a slice gives one batch.

        Returns ``None`` if batches are not made by stacking tensors.
        """
        return None if self._table is None else [leaf[indices] for leaf in self._table[0]]

    @cached_property
    def _table(self) -> tuple[list[Tensor], TreeSpec] | None:
        """All examples, stacked; ``None`` if they are not tensors of one shape, or do not fit the memory limit."""
        if self.collate_fn is not default_collate or self.takes_lists or not len(self):
            return None
        with isolate_rng():  # items may be random
            # the same item twice: a dimension of length 2 in one item cannot be mistaken for the one over examples
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
                return None  # the examples differ in shape

    def _untabled(self, indices: list[int]) -> Any:
        if self.takes_lists:
            return self.collate_fn(self.dataset[indices])
        if hasattr(self.dataset, "__getitems__"):
            return self.collate_fn(self.dataset.__getitems__(indices))
        return self.collate_fn([self.dataset[index] for index in indices])

    def refuse_changes(self, run: Run) -> None:
        """Refuse data that a run was not trained on; runs with the same recorded checksums are compared once.

        Raises:
            ReplayError: If the data differ. The message names the examples.
        """
        recorded = 0 if run.manifest.examples is None else run.manifest.examples["crc32"]
        if recorded not in self._compared:
            refuse_changed_data(run, self.dataset, self._loader)
        if recorded:
            self._compared.add(recorded)

    def column(self, key: str) -> list[Any]:
        """Return the entry of every item at a key: a position in a tuple, or a key of a dictionary.

        Tensors and arrays with a single element are converted to Python numbers.

        Raises:
            LookupError: If the items have no such key. The message lists the keys that they have.
        """
        with isolate_rng():  # items may be random
            values = [_entry(self.dataset[index], key) for index in range(len(self))]
        return [
            value.item() if isinstance(value, _ARRAYS) and math.prod(value.shape) == 1 else value for value in values
        ]

    def restore(self, leaves: Sequence[Tensor]) -> Any:
        """Arrange the stored tensors of a batch, each ``(B, ...)``, in the structure of this data set's batches.

        Raises:
            ReplayError: If the batches of this data set consist of different tensors.
        """
        found, wanted = example_types(list(leaves)), example_types(self._template)
        if found != wanted:
            raise ReplayError(
                f"An example of the stored batches is {found}; one of the given data is {wanted}. Give the data that "
                "the runs were trained on."
            )
        return tree_unflatten(list(leaves), tree_flatten(self._template)[1])

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
    """Return the queries of a Dataset or a DataLoader, in the order of the data set.

    Args:
        queries: Dataset or DataLoader of the queries.
        training: Training examples. Queries given as a Dataset are collated in the same way.

    Raises:
        AttributionError: If ``queries`` is neither, or is empty.
    """
    examples = _examples(queries, "queries", like=training)
    if not len(examples):
        raise AttributionError("There are no queries. Give a data set with at least one example.")
    return examples


def query_names(queries: Examples) -> tuple[int, ...]:
    """Return the names of queries: for a ``Subset``, their indices in the original data set; else their positions."""
    dataset = queries.dataset
    return tuple(int(i) for i in dataset.indices) if isinstance(dataset, Subset) else tuple(range(len(queries)))


def prepare_fit(data: LightningDataModule | LightningModule) -> None:
    """Call the hooks that the Trainer calls before it asks for the loaders."""
    data.prepare_data()
    data.setup("fit")


def _entry(item: Any, key: str) -> Any:
    """Return the entry of an item at a key, given as text."""
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
        + (", or a LightningDataModule with one training DataLoader." if argument == "data" else ".")
    )
