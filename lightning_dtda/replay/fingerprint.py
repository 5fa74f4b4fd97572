"""Checks whether a data set is the one that a run was trained on, and which examples differ."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import DataLoader

from lightning_dtda.errors import ReplayError
from lightning_dtda.replay.item_checksum import item_checksum
from lightning_dtda.trajectory import Run
from lightning_dtda.trajectory.example_checksums import ExampleChecksums, list_examples

_FINGERPRINT_EXAMPLES = 16
"""Minimum number of examples in a fingerprint; there are fewer than twice as many. A fingerprint is cheap for any data
set, and does not depend on how fast the examples are read."""

READING_SECONDS = 10.0
"""Time limit for reading examples. If they are in memory, it is enough for all of them (half a million, say)."""

_CHUNK = 16
"""Number of examples to read at a time if the data set can read several at once: few, because each may be large."""

_log = logging.getLogger(__name__)


def dataset_fingerprint(dataset: Any) -> str:
    """Hash evenly spaced examples of a data set. The hash is the same for the same data in the same order.

    Example:
        >>> dataset_fingerprint([1, 2, 3]) == dataset_fingerprint([1, 3, 2])
        False
    """
    return fingerprint_of(example_checksums(dataset, seconds=0))


def fingerprint_of(checksums: ExampleChecksums) -> str:
    """Return the fingerprint of a data set, given its checksums."""
    of_fingerprint = checksums.values[:: coarse_stride(checksums.length) // checksums.stride]
    content = f"{checksums.length} {of_fingerprint.tolist()}"
    return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()


def example_checksums(
    dataset: Any,
    loader: DataLoader[Any] | None = None,
    seconds: float | None = None,
    finest: int = 1,
    read: Callable[[Iterator[list[int]]], Iterator[list[int]]] | None = None,
) -> ExampleChecksums:
    """Read evenly spaced examples of a data set and return their checksums.

    Args:
        dataset: Any map-style data set.
        loader: DataLoader of the training, to read the examples as it does.
        seconds: Time limit for reading; :data:`READING_SECONDS` if not given. The examples of the fingerprint are
            always read; after that, their number is doubled as long as time permits.
        finest: Stride at which to stop.
        read: Function that yields the checksums of examples at lists of indices; :func:`reader` if not given.
    """
    length = len(dataset)
    ranges: list[range] = []

    def chunks() -> Iterator[list[int]]:
        for indices in _spread(length, READING_SECONDS if seconds is None else seconds, finest):
            ranges.append(indices)
            for start in range(0, len(indices), _CHUNK):
                yield list(indices[start : start + _CHUNK])

    with isolate_rng():
        checksums = reader(dataset, loader, chunks(), checksums_of) if read is None else read(chunks())
        values = torch.tensor(list(chain.from_iterable(checksums)), dtype=torch.int64)
    stride = coarse_stride(length) >> (len(ranges) - 1)
    where = torch.cat([torch.arange(indices.start, indices.stop, indices.step) for indices in ranges]) // stride
    found = torch.empty_like(values)
    found[where] = values
    return ExampleChecksums(length, stride, found)


def reader(
    dataset: Any,
    loader: DataLoader[Any] | None,
    batches: Iterable[list[int]],
    collate_fn: Callable[[list[Any]], Any],
    as_trained: bool = False,
    ahead: bool = False,
) -> Iterator[Any]:
    """Iterate over batches of examples at given indices, read in the same kind of process as in the training.

    If the training uses workers, the examples are read in a worker. Otherwise, a data set that opens its file on first
    access would open it in this process, and workers forked later would share its file position.

    Args:
        dataset: The data set.
        loader: DataLoader of the training, if there is one.
        batches: Lists of indices.
        collate_fn: Function applied to the list of items of each batch.
        as_trained: Whether to ask the data set for whole batches if the training does (``batch_size=None``).
        ahead: Whether all workers read as far ahead as in the training; otherwise one worker reads, with little
            prefetching.
    """
    takes_lists = as_trained and loader is not None and loader.batch_sampler is None
    settings: dict[str, Any] = {"batch_size": None, "sampler": batches} if takes_lists else {"batch_sampler": batches}
    if loader is not None and loader.num_workers > 0:
        settings |= {
            "num_workers": loader.num_workers if ahead else 1,
            "prefetch_factor": loader.prefetch_factor if ahead else None,
            "multiprocessing_context": loader.multiprocessing_context,
            "worker_init_fn": loader.worker_init_fn,
        }
    return iter(DataLoader(dataset, collate_fn=collate_fn, **settings))


def checksums_of(items: list[Any]) -> list[int]:
    """Return the checksums of items; used as a ``collate_fn``."""
    return list(map(item_checksum, items))


def _spread(length: int, seconds: float, finest: int = 1) -> Iterator[range]:
    """Yield indices of a data set: first those of the fingerprint, then those halfway between the ones so far.

    Each range doubles the number of indices. The iteration ends when the next range would exceed the time limit,
    assuming that it takes as long as all before it together.
    """
    started = time.monotonic()
    stride = coarse_stride(length)
    yield range(0, length, stride)
    while stride > finest and 2 * (time.monotonic() - started) < seconds:
        yield range(stride // 2, length, stride)
        stride //= 2


def coarse_stride(length: int) -> int:
    """Return the stride between the examples of the fingerprint, a power of two.

    Example:
        >>> [coarse_stride(length) for length in (0, 31, 32, 50_000)]
        [1, 1, 2, 2048]
    """
    return 1 << max((length // _FINGERPRINT_EXAMPLES).bit_length() - 1, 0)


def refuse_changed_data(run: Run, dataset: Any, loader: DataLoader[Any] | None = None) -> None:
    """Compare training data with the recorded checksums of a run, and refuse data that it was not trained on.

    If reading all examples would take too long, only every second, fourth, ... is compared, and a warning is logged.

    Args:
        run: The run. If it stored the batches themselves, only the number of examples is compared.
        dataset: The training data.
        loader: DataLoader of the training, to read the examples as it does.

    Raises:
        ReplayError: If the data differ. The message names the examples.
        TrajectoryError: If the record is damaged.
    """
    recorded = run.manifest.configuration["dataset"]
    if len(dataset) != recorded["length"]:
        raise ReplayError(
            f"The training data have {len(dataset)} examples; {run.path} was trained on {recorded['length']}. Give "
            "the data that the run was trained on."
        )
    if recorded["fingerprint"] is None:
        return
    wanted = run.example_checksums
    if wanted is None:
        if recorded["fingerprint"] != dataset_fingerprint(dataset):
            raise ReplayError(
                f"The training data are not those of {run.path}: their content or their order differs. Give the data "
                "that the run was trained on."
            )
        return
    found = example_checksums(dataset, loader, finest=wanted.stride)
    compared = min(len(found), len(wanted))
    if changed := wanted.changed(found):
        raise ReplayError(
            f"Example {list_examples(changed)} of the training data is not the one that {run.path} was trained on "
            f"({compared} of {len(dataset)} were compared). Give the data that the run was trained on, in the same "
            "order."
        )
    if compared < len(dataset):
        _log.warning(
            "Only every %dth training example was compared with the record (%d of %d), since reading all of them takes "
            "too long. These are unchanged.",
            max(found.stride, wanted.stride),
            compared,
            len(dataset),
        )
