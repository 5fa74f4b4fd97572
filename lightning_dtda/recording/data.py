"""Checks of the training data: examples have indices, are always the same, and make up the batch that is trained on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils._pytree import tree_flatten
from torch.utils.data import DataLoader

from lightning_dtda.errors import RecordingError
from lightning_dtda.replay.batches import rows_of
from lightning_dtda.replay.fingerprint import combine_fingerprint, fingerprint_bytes, fingerprint_indices

_PROBED_EXAMPLES = 16
"""Examples asked for twice: an augmentation that flips a coin for each goes unnoticed once in 2^16 trainings."""


class TrainingData:
    """The data set that a training began with.

    Args:
        loader: The training DataLoader.
        stored: As for :func:`describe_data`.

    Raises:
        RecordingError: As :func:`describe_data`.
    """

    def __init__(self, loader: DataLoader[Any], stored: bool = False) -> None:
        self.description = describe_data(loader, stored)
        self._stored = stored
        self._described: Any = loader.dataset

    def __len__(self) -> int:
        return int(self.description["length"])

    def refuse_change(self, loader: DataLoader[Any], epoch: int) -> None:
        """Refuse another data set than that of the start.

        Args:
            loader: The training DataLoader as it is now.
            epoch: The epoch that begins.

        Raises:
            RecordingError: If its content is another.
        """
        if loader.dataset is self._described:
            return
        self._described = loader.dataset
        if describe_data(loader, self._stored) != self.description:
            raise RecordingError(
                f"The training data changed at epoch {epoch}: another data set than at the start. "
                "Train on one data set (without reload_dataloaders_every_n_epochs, or reloading the same data)."
            )

    def check_indices(self, indices: Tensor, batch: Any) -> None:
        """Check that each row of a batch can be told by an index.

        Raises:
            RecordingError: If the indices are not those of examples, or not as many as the batch has rows.
        """
        length = len(self)
        if len(indices) != (rows := rows_of(batch)) or not 0 <= int(indices.min()) <= int(indices.max()) < length:
            raise RecordingError(
                f"A batch of {rows} examples was made of the indices {indices.tolist()} of {length}. Let the sampler "
                f"yield indices from 0 to {length - 1}, and the collate_fn keep every example."
            )


def describe_data(loader: DataLoader[Any], stored: bool = False) -> dict[str, Any]:
    """Return what must not differ between runs: the data set's class, length and fingerprint.

    Args:
        loader: The training DataLoader.
        stored: Whether batches are stored, so that examples may differ each time they are asked for; they have no
            fingerprint then.

    Raises:
        RecordingError: If the data set has no integer indices, or gives another example each time it is asked.
    """
    dataset: Any = loader.dataset
    name = type(dataset).__name__
    if not hasattr(dataset, "__len__"):
        raise RecordingError(f"{name} has no length. Define __len__, so that removal can be of examples by index.")
    length = len(dataset)
    description = {"class": f"{type(dataset).__module__}.{type(dataset).__qualname__}", "length": length}
    if stored:
        return description | {"fingerprint": None}
    twice = [index for index in range(min(length, _PROBED_EXAMPLES)) for _ in range(2)]
    indices = [*twice, *fingerprint_indices(length)]
    contents = []
    with isolate_rng():
        reader = _read(loader, indices)
        for index in indices:
            try:
                contents.append(next(reader))
            except Exception as error:
                raise RecordingError(
                    f"{name}[{index}] fails ({type(error).__name__}: {_last_line(error)}). Let the data set take the "
                    f"indices 0 to {length - 1}, so that removal can be of examples by index."
                ) from error
    for index in range(len(twice) // 2):
        if contents[2 * index] != contents[2 * index + 1]:
            raise RecordingError(
                f"{name}[{index}] differs between two calls (random augmentation?), so that the recorded steps could "
                'not be reproduced. Store the batches themselves, TrajectoryRecorder(batches="store"), or make the '
                "data set deterministic."
            )
    return description | {"fingerprint": combine_fingerprint(length, contents[len(twice) :])}


def check_batch(loader: DataLoader[Any], indices: Tensor, batch: Any, convert: Callable[[Any], Any]) -> None:
    """Check that a batch is what the ``collate_fn`` makes of the examples at its indices.

    Args:
        loader: The training DataLoader.
        indices: What its sampler drew.
        batch: The batch that ``training_step`` is about to get.
        convert: What the Trainer's precision does to batches.

    Raises:
        RecordingError: If it differs: a ``collate_fn`` that draws random numbers or drops examples.
    """
    with isolate_rng():
        again = convert(next(_read(loader, [indices.tolist()], loader.collate_fn)))
    found, wanted = tree_flatten(again), tree_flatten(batch)
    same = found[1] == wanted[1] and all(map(_equal, found[0], wanted[0]))
    if not same:
        raise RecordingError(
            "The first batch is not what the collate_fn makes of its examples when it is asked again (random mixup, "
            "other examples?), so that the recorded steps could not be reproduced. Store the batches themselves, "
            'TrajectoryRecorder(batches="store"), or make the collate_fn deterministic.'
        )


def _read(loader: DataLoader[Any], batches: list[Any], collate_fn: Callable[[list[Any]], Any] | None = None) -> Any:
    """Iterate over the content of examples, or over batches, read where the training reads them.

    In a worker where the training uses workers: data sets that open their file when they are first asked would
    otherwise do so in this process, and the workers that are forked later share its position in the file.
    """
    has_workers = loader.num_workers > 0
    reader: DataLoader[Any] = DataLoader(
        loader.dataset,
        batch_sampler=batches if collate_fn else [[index] for index in batches],
        collate_fn=collate_fn or _content,
        num_workers=int(has_workers),
        multiprocessing_context=loader.multiprocessing_context if has_workers else None,
        worker_init_fn=loader.worker_init_fn,
    )
    return iter(reader)


def _content(items: list[Any]) -> bytes:
    return fingerprint_bytes(items[0])


def _equal(first: Any, second: Any) -> bool:
    if not isinstance(first, Tensor) or not isinstance(second, Tensor):
        return fingerprint_bytes(first) == fingerprint_bytes(second)
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    return bool(torch.isclose(first.cpu(), second.cpu(), rtol=0, atol=0, equal_nan=True).all())


def _last_line(error: Exception) -> str:
    # an error in a worker comes with the worker's traceback, its own message last
    return (str(error).strip().splitlines() or [""])[-1]
