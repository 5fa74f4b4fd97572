"""DataLoaders without some of their examples, as if these had never existed."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler, Subset

from lightning_dtda.compatibility import sample_count
from lightning_dtda.errors import RetrainingError

_REWEIGHT = 'or use removal="reweight", which keeps the recorded order'


def without(loader: Any, removed: Collection[int]) -> DataLoader[Any]:
    """Return a DataLoader over the remaining examples that is otherwise the same.

    Batch size, shuffling, ``drop_last``, ``collate_fn`` and workers are those of the original. If the loader has a
    random generator, it is copied, so every training starts from the same state, as with a new loader.

    Args:
        loader: The training DataLoader; it is not changed.
        removed: Indices of the examples to remove.

    Raises:
        RetrainingError: If the behaviour of the loader with fewer examples is unknown.
    """
    if not isinstance(loader, DataLoader):
        raise RetrainingError(
            f"The training data come from a {type(loader).__name__}, not from one torch DataLoader, so no example can "
            "be removed. Return a DataLoader from train_dataloader."
        )
    dataset: Any = loader.dataset
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise RetrainingError(
            f"{type(dataset).__name__} has no indices. Use a map-style data set (__getitem__ and __len__): examples "
            "are removed by index."
        )
    left: DataLoader[Any] = copy.copy(loader)
    # DataLoader forbids setting these attributes, but its __dict__ can be changed. Not a new DataLoader: a subclass may
    # have other arguments
    entries = left.__dict__
    entries["_iterator"] = None
    if removed:
        gone = frozenset(removed)
        entries["dataset"] = Subset(dataset, [index for index in range(len(dataset)) if index not in gone])
    generator = loader.generator
    if removed or generator is not None:
        entries["generator"] = _copied(generator)
        entries["sampler"] = _sampler(loader.sampler, left, generator)
        batch_sampler = loader.batch_sampler
        if batch_sampler is not None:
            if type(batch_sampler) is not BatchSampler:
                raise RetrainingError(
                    f"The DataLoader has the batch_sampler {type(batch_sampler).__name__}, whose behaviour with fewer "
                    f"examples is unknown. Use batch_size, shuffle and drop_last, {_REWEIGHT}."
                )
            entries["batch_sampler"] = BatchSampler(left.sampler, batch_sampler.batch_size, batch_sampler.drop_last)
    return left


def _sampler(sampler: Any, left: DataLoader[Any], generator: torch.Generator | None) -> Any:
    dataset: Any = left.dataset
    if type(sampler) is SequentialSampler:
        return SequentialSampler(dataset)
    if type(sampler) is RandomSampler:
        own = left.generator if sampler.generator is generator else _copied(sampler.generator)
        return RandomSampler(dataset, sampler.replacement, sample_count(sampler), own)
    raise RetrainingError(
        f"The DataLoader has the sampler {type(sampler).__name__}, whose behaviour with fewer examples is unknown. "
        f"Use shuffle=True or shuffle=False, {_REWEIGHT}."
    )


def _copied(generator: torch.Generator | None) -> torch.Generator | None:
    return None if generator is None else generator.clone_state()
