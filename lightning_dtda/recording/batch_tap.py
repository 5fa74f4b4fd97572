"""Learns which examples are in a batch: from the sampler that chose them, not from their content."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import RunningStage
from torch.utils.data import DataLoader, IterableDataset

from lightning_dtda.errors import RecordingError
from lightning_dtda.replay.random_states import Generators


class BatchTap:
    """Learns which examples are in each training batch of a Trainer, and what the batch was before it was moved.

    The Trainer creates the loader's iterator before ``on_train_start``, and with workers it draws indices ahead. So
    the strategy's ``process_dataloader``, which every loader passes on its way in, is shadowed during fit, and the
    loader's batch sampler is wrapped there. Each iterator keeps its own list of drawn indices: what is prefetched
    and thrown away, or drawn for validation from the same loader, cannot be mistaken for the batch at hand. No
    random number is drawn that the training would not draw itself.

    The hooks on a batch's way to the module may draw random numbers (augmentation on the device) and change the batch.
    The first of what happens to a batch that was fetched is ``precision_plugin.convert_input``, which is shadowed too.

    Args:
        trainer: The Trainer, before it loads data.
        module: The module.
    """

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._trainer = trainer
        self._module = module
        self._tapped: list[tuple[DataLoader[Any], Any]] = []
        self._last: tuple[dict[str, torch.Tensor], Any] | None = None
        # instance attributes shadow the methods; `remove` deletes them again
        self._process: Callable[[Any], Any] = trainer.strategy.process_dataloader
        trainer.strategy.process_dataloader = self._process_dataloader  # type: ignore[method-assign,assignment]
        self._convert: Callable[[Any], Any] = trainer.precision_plugin.convert_input
        trainer.precision_plugin.convert_input = self._convert_input  # type: ignore[method-assign]

    def remove(self) -> None:
        """Give the Trainer and the user's loaders back as they were."""
        vars(self._trainer.strategy).pop("process_dataloader", None)
        vars(self._trainer.precision_plugin).pop("convert_input", None)
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
            or not isinstance(_sampler_of(combined.flattened[0]), _TappedBatchSampler)
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
            return list(map(operator.index, indices))
        except (TypeError, ValueError) as error:
            raise RecordingError(
                f"The sampler yields {indices!r}, not a list of data set indices. Let it yield lists of integers, or "
                "give the DataLoader a batch_size, so that a batch is a list of examples."
            ) from error

    def take(self) -> tuple[dict[str, torch.Tensor], Any]:
        """Return the states of the generators before the batch at hand was moved, and the batch as it was collated."""
        assert self._last is not None
        last, self._last = self._last, None
        return last

    def _process_dataloader(self, loader: Any) -> Any:
        if self._trainer.state.stage == RunningStage.TRAINING:
            _refuse_unsupported(loader)
            sampler = _sampler_of(loader)
            if not isinstance(sampler, _TappedBatchSampler):
                self._tapped.append((loader, sampler))
                _set_batch_sampler(loader, _TappedBatchSampler(sampler))
        return self._process(loader)

    @cached_property
    def _generators(self) -> Generators:
        """All that the module may draw from."""
        return Generators(self._module, self._module.device)

    def _convert_input(self, data: Any) -> Any:
        if self._trainer.state.stage == RunningStage.TRAINING:
            self._last = self._generators.states(), data
        return self._convert(data)


def _sampler_of(loader: Any) -> Any:
    """Return what yields the indices of a batch: the sampler itself where the data set is asked for whole batches."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    return getattr(loader, "sampler", None) if batch_sampler is None else batch_sampler


def _set_batch_sampler(loader: DataLoader[Any], batch_sampler: Any) -> None:
    # DataLoader forbids setting the attribute; its __dict__ does not
    loader.__dict__["sampler" if loader.batch_sampler is None else "batch_sampler"] = batch_sampler
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
    if not getattr(loader, "in_order", True) and loader.num_workers > 0:
        raise RecordingError(
            "The DataLoader has in_order=False, so that batches arrive in an order that depends on timing. Set "
            "in_order=True."
        )
