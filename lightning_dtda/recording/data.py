"""Checks of the training data: examples must have indices, never change, and make up the batches."""

from __future__ import annotations

import itertools
import logging
import traceback
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_dtda.compatibility import tree_flatten
from lightning_dtda.errors import RecordingError
from lightning_dtda.recording.configuration import class_path
from lightning_dtda.replay.fingerprint import (
    READING_SECONDS,
    checksums_of,
    coarse_stride,
    example_checksums,
    fingerprint_of,
    reader,
)
from lightning_dtda.replay.item_checksum import item_checksum
from lightning_dtda.replay.replica import Replica
from lightning_dtda.trajectory import Run
from lightning_dtda.trajectory.example_checksums import ExampleChecksums, list_examples

_log = logging.getLogger(__name__)


class TrainingData:
    """The data set at the start of a training.

    Args:
        loader: The training DataLoader.
        stored: Whether batches are stored. Then examples may differ each time they are read, and they have no
            fingerprint.

    Attributes:
        description: Description of the data set, which must be the same for all runs.
        checksums: Checksums of as many examples as can be read in a few seconds; ``None`` if batches are stored.

    Raises:
        RecordingError: As for :func:`describe_data`.
    """

    def __init__(self, loader: DataLoader[Any], stored: bool = False) -> None:
        self.description, self.checksums = _examine(loader, stored, READING_SECONDS)
        self._stored = stored
        if self.checksums is not None and len(self.checksums) < len(self):
            _log.info(
                "Reading all %d training examples would take too long: a checksum is recorded for every %dth example, "
                "%d in total. Changes to the others will not be detected.",
                len(self),
                self.checksums.stride,
                len(self.checksums),
            )
        self._described: Any = loader.dataset

    def __len__(self) -> int:
        return int(self.description["length"])

    def refuse_change(self, loader: DataLoader[Any], epoch: int) -> None:
        """Refuse a data set that differs from the one at the start.

        Args:
            loader: The current training DataLoader.
            epoch: The epoch that is about to start.

        Raises:
            RecordingError: If the content of the data set is different.
        """
        if loader.dataset is self._described:
            return
        self._described = loader.dataset
        description, checksums = _examine(loader, self._stored, READING_SECONDS)
        changed = self._changed(checksums) if len(self) == description["length"] else []
        if description != self.description or changed:
            which = f"example {list_examples(changed)} is different" if changed else "the data set is different"
            raise RecordingError(
                f"The training data changed at epoch {epoch}: {which}. Train on the same data throughout (without "
                "reload_dataloaders_every_n_epochs, or reloading the same data)."
            )

    def refuse_others(self, run: Run) -> None:
        """Refuse to continue a run that was trained on other data.

        Raises:
            RecordingError: If the data differ; the message names the examples.
        """
        if changed := self._changed(run.example_checksums):
            raise RecordingError(
                f"Example {list_examples(changed)} of the training data is not the one that {run.path} was trained on. "
                "Continue with the same data, in the same order."
            )

    def _changed(self, other: ExampleChecksums | None) -> list[int]:
        return [] if self.checksums is None or other is None else self.checksums.changed(other)

    def check_indices(self, indices: list[int]) -> None:
        """Check that the indices of a batch are those of examples.

        Raises:
            RecordingError: If an index is out of range.
        """
        length = len(self)
        if not indices or not 0 <= min(indices) <= max(indices) < length:
            raise RecordingError(
                f"A batch has the indices {indices}, but there are {length} examples. Let the sampler yield "
                f"indices from 0 to {length - 1}."
            )


def describe_data(loader: DataLoader[Any]) -> dict[str, Any]:
    """Return the class, length and fingerprint of the data set, which must be the same for all runs.

    Args:
        loader: The training DataLoader.

    Raises:
        RecordingError: If the data set has no integer indices, or an example differs each time it is read.
    """
    return _examine(loader, stored=False, seconds=0)[0]


def check_batch(collated: Any, batch: Any, replica: Replica, states: Mapping[str, Tensor]) -> None:
    """Check that a batch can be reproduced from the examples at its indices.

    Args:
        collated: Output of the ``collate_fn`` for the examples.
        batch: The batch that will be passed to ``training_step``.
        replica: Replica of the module, which moves ``collated`` to the device.
        states: States of the random number generators before ``batch`` was moved.

    Raises:
        RecordingError: If the batches differ because the ``collate_fn`` draws random numbers or drops examples.
    """
    with replica.generators.kept():
        replica.generators.set(states)
        again = replica.moved(collated)
    found, wanted = tree_flatten(again), tree_flatten(batch)
    if found[1] != wanted[1] or not all(map(_equal, found[0], wanted[0])):
        raise RecordingError(
            "Collating the examples of the first batch a second time gives a different batch (random mixup, different "
            "examples?), so the recorded steps could not be reproduced. Store the batches themselves, "
            'TrajectoryRecorder(batches="store"), or make the collate_fn deterministic.'
        )


def read_batch(loader: DataLoader[Any], indices: list[int]) -> Any:
    """Return the batch of the examples at some indices, read in the same process or workers as in the training."""
    with isolate_rng():
        return next(reader(loader.dataset, loader, [indices], loader.collate_fn, as_trained=True))


def _examine(loader: DataLoader[Any], stored: bool, seconds: float) -> tuple[dict[str, Any], ExampleChecksums | None]:
    """Describe a data set, and compute the checksums of as many examples as can be read in the given time."""
    dataset: Any = loader.dataset
    name = type(dataset).__name__
    if not hasattr(dataset, "__len__"):
        raise RecordingError(f"{name} has no length. Define __len__: examples are removed by index.")
    length = len(dataset)
    description = {"class": class_path(type(dataset)), "length": length}
    if stored:
        return description | {"fingerprint": None}, None
    checksums = example_checksums(dataset, loader, seconds, read=partial(_checksums, loader))
    return description | {"fingerprint": fingerprint_of(checksums)}, checksums


def _checksums(loader: DataLoader[Any], batches: Iterator[list[int]]) -> Iterator[list[int]]:
    """Yield the checksums of the examples at the given indices, batch by batch.

    Args:
        loader: The training DataLoader.
        batches: Batches of indices.

    Raises:
        RecordingError: If an example cannot be read, or differs when it is read again; the message names its index.
    """
    dataset: Any = loader.dataset
    name, stride = type(dataset).__name__, coarse_stride(len(dataset))
    drawn: list[list[int]] = []  # workers read ahead

    def drawing() -> Iterator[list[int]]:
        for batch in batches:
            # examples of the fingerprint are read twice: an augmentation that flips a coin for each example is missed
            # once in 2^16 trainings
            for _ in range(1 if batch[0] % stride else 2):
                drawn.append(batch)
                yield batch

    found = reader(dataset, loader, drawing(), checksums_of)
    before: list[int] = []
    for number in itertools.count():
        try:
            checksums = next(found)
        except StopIteration:
            return
        except Exception as error:
            index, reason = _failing(loader, drawn[number], error)
            # the frames hold the workers' iterators, which block for seconds when the garbage collector deletes them
            for failed in (error, reason):
                traceback.clear_frames(failed.__traceback__)
            del found
            raise RecordingError(
                f"{name}[{index}] fails ({type(reason).__name__}: {_last_line(reason)}). Let the data set accept the "
                f"indices 0 to {len(dataset) - 1}: examples are removed by index."
            ) from error
        if number == 0 or drawn[number] is not drawn[number - 1]:
            yield checksums
        elif checksums != before:
            index = next(i for i, one, other in zip(drawn[number], checksums, before, strict=True) if one != other)
            raise RecordingError(
                f"{name}[{index}] differs between two calls (random augmentation?), so the recorded steps could not "
                'be reproduced. Store the batches themselves, TrajectoryRecorder(batches="store"), or make the '
                "data set deterministic."
            )
        before = checksums


def _failing(loader: DataLoader[Any], batch: list[int], error: Exception) -> tuple[int, Exception]:
    """Return the first index of a batch that fails, and its error."""
    for index in batch if len(batch) > 1 else ():
        try:
            next(reader(loader.dataset, loader, [[index]], checksums_of))
        except Exception as reason:
            return index, reason
    return batch[0], error


def _equal(first: Any, second: Any) -> bool:
    if not isinstance(first, Tensor) or not isinstance(second, Tensor):
        return item_checksum(first) == item_checksum(second)
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    return bool(torch.isclose(first.cpu(), second.cpu(), rtol=0, atol=0, equal_nan=True).all())


def _last_line(error: Exception) -> str:
    # an error in a worker includes the worker's traceback, with the message last
    return (str(error).strip().splitlines() or [""])[-1]
