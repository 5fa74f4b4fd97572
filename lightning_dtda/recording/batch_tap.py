"""Identifies the examples in a batch by the indices from the sampler, not by their content."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import RunningStage
from torch.utils.data import DataLoader, IterableDataset

from lightning_dtda.compatibility import fetched, keep_index_sampler, missing, training_loaders
from lightning_dtda.errors import RecordingError
from lightning_dtda.recording.crossed_seeds import NoiseStream, OrderStream, RunSeeds, draws_from_torch
from lightning_dtda.replay.random_states import Generators


class BatchTap:
    """Finds out which examples are in each training batch of a Trainer, and keeps the batch as it was before transfer.

    The Trainer creates the loader's iterator before ``on_train_start``, and with workers it draws indices ahead. For
    this reason the strategy's ``process_dataloader``, which every loader passes through, is shadowed during fit, and
    wraps the loader's batch sampler. Each iterator keeps its own list of drawn indices, so a batch that is prefetched
    and discarded, or drawn for validation from the same loader, cannot be confused with the current one. No additional
    random numbers are drawn.

    Hooks may draw random numbers and change the batch on its way to the module (augmentation on the device). The first
    function called on a fetched batch is ``precision_plugin.convert_input``, so this is shadowed too.

    With seeds set apart by source, this is also where they take over: what is drawn before the training data are loaded
    belongs to the initialisation, what the samplers draw to the order, and the rest to the noise.

    Args:
        trainer: The Trainer, before it loads data.
        module: The module.
        seeds: Seeds of the sources of randomness, if they are set apart.
    """

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule, seeds: RunSeeds | None = None) -> None:
        self._trainer = trainer
        self._module = module
        self._seeds = seeds
        self._streams: tuple[OrderStream, NoiseStream] | None = None
        self._tapped: list[tuple[DataLoader[Any], Any]] = []
        self._last: tuple[dict[str, torch.Tensor], Any] | None = None
        # instance attributes shadow the methods; `remove` deletes them again
        self._process: Callable[[Any], Any] = trainer.strategy.process_dataloader
        trainer.strategy.process_dataloader = self._process_dataloader  # type: ignore[method-assign,assignment]
        self._convert: Callable[[Any], Any] = trainer.precision_plugin.convert_input
        trainer.precision_plugin.convert_input = self._convert_input  # type: ignore[method-assign]

    def remove(self) -> None:
        """Restore the Trainer and the user's loaders."""
        vars(self._trainer.strategy).pop("process_dataloader", None)
        vars(self._trainer.precision_plugin).pop("convert_input", None)
        for loader, batch_sampler in self._tapped:
            _set_batch_sampler(loader, batch_sampler)
        self._tapped.clear()
        if self._streams is not None:
            self._streams[0].end()

    @property
    def loader(self) -> DataLoader[Any]:
        """The training DataLoader.

        Raises:
            RecordingError: If there is not exactly one.
        """
        combined = training_loaders(self._trainer)
        # a collection of one loader is refused too: its batches come wrapped in a dict or a list
        # the loader may have been tapped by another callback
        if (
            combined is None
            or combined.flattened != [combined.iterables]
            or not isinstance(_sampler_of(combined.flattened[0]), _TappedBatchSampler)
        ):
            count = 0 if combined is None else len(combined.flattened)
            raise RecordingError(
                f"The training data are a collection of {count} DataLoaders, but recording needs exactly one. Join the "
                "data sets (torch.utils.data.ConcatDataset) and return one DataLoader."
            )
        loader: DataLoader[Any] = combined.flattened[0]
        return loader

    def current_indices(self) -> list[int]:
        """Return the data set indices of the batch that the Trainer just fetched, in order.

        Raises:
            CompatibilityError: If this version of Lightning or torch stores its iterators elsewhere.
            RecordingError: If the sampler yields anything other than integers.
        """
        iterator, number = fetched(self._trainer)
        try:
            drawn: dict[int, Any] = iterator.drawn
            indices = drawn[number]
        except (AttributeError, KeyError) as error:
            raise missing("The number of the batch in training", error) from error
        # keep the current batch: another callback may be using the same tap
        for earlier in [key for key in drawn if key < number]:
            del drawn[earlier]
        try:
            return list(map(operator.index, indices))
        except (TypeError, ValueError) as error:
            raise RecordingError(
                f"The sampler yields {indices!r}, which is not a list of data set indices. Let it yield lists of "
                "integers, or give the DataLoader a batch_size, which makes every batch a list of examples."
            ) from error

    def take(self) -> tuple[dict[str, torch.Tensor], Any]:
        """Return the states of the generators before the current batch was moved, and the batch as it was collated."""
        assert self._last is not None
        last, self._last = self._last, None
        return last

    def _process_dataloader(self, loader: Any) -> Any:
        if self._trainer.state.stage == RunningStage.TRAINING:
            _refuse_unsupported(loader)
            if self._seeds is not None:
                if self._streams is None:
                    self._streams = OrderStream(self._seeds), NoiseStream(self._seeds, self._module)
                self._streams[0].begin(loader)
            sampler = _sampler_of(loader)
            if not isinstance(sampler, _TappedBatchSampler):
                self._tapped.append((loader, sampler))
                _set_batch_sampler(loader, _TappedBatchSampler(sampler, self._streams))
        return self._process(loader)

    @cached_property
    def _generators(self) -> Generators:
        """All random number generators that the module may draw from."""
        return Generators(self._module, self._module.device)

    def _convert_input(self, data: Any) -> Any:
        if self._trainer.state.stage == RunningStage.TRAINING:
            if self._streams is not None:
                self._streams[1].begin("batch", self._generators)
            self._last = self._generators.states(), data
        return self._convert(data)


def _sampler_of(loader: Any) -> Any:
    """Return the sampler that yields a batch's indices: the plain sampler if automatic batching is disabled."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    return getattr(loader, "sampler", None) if batch_sampler is None else batch_sampler


def _set_batch_sampler(loader: DataLoader[Any], batch_sampler: Any) -> None:
    # DataLoader forbids setting the attribute, but its __dict__ can be changed
    loader.__dict__["sampler" if loader.batch_sampler is None else "batch_sampler"] = batch_sampler
    # an iterator with persistent workers outlives the epoch, perhaps the training, and has a reference to the sampler
    keep_index_sampler(loader, batch_sampler)


class _TappedBatchSampler:
    """The user's batch sampler, with iterators that remember what they yielded."""

    def __init__(self, inner: Any, streams: tuple[OrderStream, NoiseStream] | None) -> None:
        vars(self).update(_inner=inner, _streams=streams)

    def __iter__(self) -> _TappedIterator:
        with _drawing(self._streams, self._inner, "workers"):
            return _TappedIterator(self._inner, self._streams)

    def __len__(self) -> int:
        return len(self._inner)

    def __getattr__(self, name: str) -> Any:
        # set_epoch, batch_size, drop_last, ...; the guard prevents infinite recursion when copying and unpickling
        if name in ("_inner", "_streams"):
            raise AttributeError(name)
        return getattr(self._inner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # a callback may change the sampler during training: its batch_size or epoch
        setattr(self._inner, name, value)


class _TappedIterator:
    """Remembers the batches of indices that were drawn but not yet requested, by their number."""

    def __init__(self, sampler: Any, streams: tuple[OrderStream, NoiseStream] | None) -> None:
        self._sampler = sampler
        self._inner = iter(sampler)
        self._streams = streams
        self._count = 0
        self.drawn: dict[int, Any] = {}

    def __iter__(self) -> _TappedIterator:
        return self

    def __next__(self) -> Any:
        with _drawing(self._streams, self._sampler, "items"):
            indices = next(self._inner)
        # a copy: a sampler may refill and yield the same list again before this batch is trained on
        self.drawn[self._count] = indices.tolist() if isinstance(indices, torch.Tensor) else copy.copy(indices)
        self._count += 1
        return indices


@contextmanager
def _drawing(
    streams: tuple[OrderStream, NoiseStream] | None, sampler: Any, follows: Literal["items", "workers"]
) -> Iterator[None]:
    """Let the sampler draw the order; what the loader draws afterwards is noise."""
    if streams is None:
        yield
        return
    order, noise = streams
    with order.drawing(all_generators=not draws_from_torch(sampler)):
        yield
    noise.begin(follows)


def _refuse_unsupported(loader: Any) -> None:
    if not isinstance(loader, DataLoader):
        raise RecordingError(
            f"The training data come from a {type(loader).__name__}, not from a torch DataLoader, so the order of the "
            "examples cannot be recorded. Return a DataLoader from train_dataloader."
        )
    if isinstance(loader.dataset, IterableDataset):
        raise RecordingError(
            f"{type(loader.dataset).__name__} is an IterableDataset: its examples have no indices, so none can be "
            "removed. Use a map-style data set (__getitem__ and __len__)."
        )
    if not getattr(loader, "in_order", True) and loader.num_workers > 0:
        raise RecordingError(
            "The DataLoader has in_order=False, so the order of the batches depends on timing. Set in_order=True."
        )
