"""Learns which examples are in a batch: from the sampler that chose them, not from their content."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import RunningStage
from torch.utils.data import DataLoader, IterableDataset

from lightning_dtda.errors import RecordingError


class BatchTap:
    """Taps the batch sampler of the training DataLoader while a Trainer fits.

    The Trainer creates the loader's iterator before ``on_train_start``, and with workers it draws indices ahead. So
    the strategy's ``process_dataloader``, which every loader passes on its way in, is shadowed during fit, and the
    loader's batch sampler is wrapped there. Each iterator keeps its own list of drawn indices: what is prefetched
    and thrown away, or drawn for validation from the same loader, cannot be mistaken for the batch at hand. No
    random number is drawn that the training would not draw itself.

    Args:
        trainer: The Trainer, before it loads data.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer
        self._tapped: list[tuple[DataLoader[Any], Any]] = []
        self._original: Callable[[Any], Any] = trainer.strategy.process_dataloader
        # an instance attribute shadows the method; `remove` deletes it again
        trainer.strategy.process_dataloader = self._process_dataloader  # type: ignore[method-assign,assignment]

    def remove(self) -> None:
        """Give the Trainer and the user's loaders back as they were."""
        self._trainer.strategy.__dict__.pop("process_dataloader", None)
        for loader, batch_sampler in self._tapped:
            _set_batch_sampler(loader, batch_sampler)
        self._tapped.clear()

    @property
    def loader(self) -> DataLoader[Any]:
        """The training DataLoader.

        Raises:
            RecordingError: If there is not exactly one.
        """
        combined = self._trainer.fit_loop._combined_loader
        # a collection of one is refused too: its batches come wrapped in a dict or a list
        # by whichever callback's tap: each sees to it that the loader is tapped
        if (
            combined is None
            or combined.flattened != [combined.iterables]
            or not isinstance(getattr(combined.flattened[0], "batch_sampler", None), _TappedBatchSampler)
        ):
            count = 0 if combined is None else len(combined.flattened)
            raise RecordingError(
                f"The training data are a collection of {count} DataLoaders; recording needs a single one. Join the "
                "data sets (torch.utils.data.ConcatDataset) and return one DataLoader."
            )
        loader: DataLoader[Any] = combined.flattened[0]
        return loader

    def current_indices(self) -> list[int]:
        """Return the data set indices of the batch that the Trainer just fetched, in order.

        Raises:
            RecordingError: If this version of Lightning or torch keeps its iterators elsewhere, or the sampler yields
                something other than integers.
        """
        try:
            fetcher = self._trainer.fit_loop._data_fetcher
            iterator: Any = fetcher.combined_loader._iterator.iterators[0]  # type: ignore[union-attr]
            drawn: dict[int, Any] = iterator._sampler_iter.drawn
            ahead = len(getattr(fetcher, "batches", ()))
            number = iterator._num_yielded - 1 - ahead
            indices = drawn[number]
        except (AttributeError, KeyError) as error:
            raise RecordingError(
                f"Cannot tell which examples are in the batch: lightning {pl.__version__} with torch "
                f"{torch.__version__} keeps its iterators in an unknown way ({error!r}). Use versions that "
                "lightning-dtda is tested with."
            ) from error
        # this one stays: another callback may tap the same loader
        for earlier in [key for key in drawn if key < number]:
            del drawn[earlier]
        try:
            return [operator.index(index) for index in indices]
        except (TypeError, ValueError) as error:
            raise RecordingError(
                f"The sampler yields {indices!r}, not data set indices. Let it yield integers, so that removal can be "
                "of examples by index."
            ) from error

    def _process_dataloader(self, loader: Any) -> Any:
        if self._trainer.state.stage == RunningStage.TRAINING:
            _refuse_unsupported(loader)
            if not isinstance(loader.batch_sampler, _TappedBatchSampler):
                self._tapped.append((loader, loader.batch_sampler))
                _set_batch_sampler(loader, _TappedBatchSampler(loader.batch_sampler))
        return self._original(loader)


def _set_batch_sampler(loader: DataLoader[Any], batch_sampler: Any) -> None:
    # DataLoader forbids setting the attribute; its __dict__ does not
    loader.__dict__["batch_sampler"] = batch_sampler
    # an iterator with persistent workers outlives the epoch, perhaps the training, and holds the sampler itself
    iterator: Any = getattr(loader, "_iterator", None)
    if iterator is not None:
        iterator._index_sampler = batch_sampler


class _TappedBatchSampler:
    """The user's batch sampler, with iterators that remember what they yielded."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __iter__(self) -> _TappedIterator:
        return _TappedIterator(iter(self._inner))

    def __len__(self) -> int:
        return len(self._inner)

    def __getattr__(self, name: str) -> Any:
        # set_epoch, batch_size, drop_last, ...; the guard keeps copying and unpickling from recursing
        if name == "_inner":
            raise AttributeError(name)
        return getattr(self._inner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # a callback may change the sampler in mid-training: batch_size, its epoch
        if name == "_inner":
            super().__setattr__(name, value)
        else:
            setattr(self._inner, name, value)


class _TappedIterator:
    """Remembers the index batches drawn but not yet asked for, by their number."""

    def __init__(self, inner: Iterator[Any]) -> None:
        self._inner = inner
        self._count = 0
        self.drawn: dict[int, Any] = {}

    def __iter__(self) -> _TappedIterator:
        return self

    def __next__(self) -> Any:
        indices = next(self._inner)
        # a copy: a sampler may yield the same list again, filled anew, before this batch is trained on
        self.drawn[self._count] = indices.tolist() if isinstance(indices, torch.Tensor) else copy.copy(indices)
        self._count += 1
        return indices


def _refuse_unsupported(loader: Any) -> None:
    if not isinstance(loader, DataLoader):
        raise RecordingError(
            f"The training data come from a {type(loader).__name__}, not from a torch DataLoader, so that the order of "
            "examples cannot be recorded. Return a DataLoader from train_dataloader."
        )
    if isinstance(loader.dataset, IterableDataset):
        raise RecordingError(
            f"{type(loader.dataset).__name__} is an IterableDataset: its examples have no indices, so that none can be "
            "removed. Use a map-style data set (__getitem__ and __len__)."
        )
    if loader.batch_sampler is None:
        raise RecordingError(
            "Automatic batching is off (batch_size=None). Give the DataLoader a batch_size or a batch_sampler, so "
            "that a batch is a list of examples."
        )
    if not getattr(loader, "in_order", True) and loader.num_workers > 0:
        raise RecordingError(
            "The DataLoader has in_order=False, so that batches arrive in an order that depends on timing. Set "
            "in_order=True."
        )
