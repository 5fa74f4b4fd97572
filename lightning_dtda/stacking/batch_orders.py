"""The order of examples that a training with a given seed would have, without training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, TypeAlias

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from lightning_dtda.errors import CannotStackError
from lightning_dtda.trajectory import Run

Begin: TypeAlias = Callable[[int], "tuple[pl.LightningModule, DataLoader[Any]]"]
"""Function that runs a training with a seed up to its first batch, and returns the module and the loader."""

_MOST_DRAWS = 16
"""Maximum number of draws before an epoch to try: the loader's iterator makes one, as does each validation loop."""


@dataclass(frozen=True)
class Epoch:
    """One pass over the data.

    Args:
        batches: Number of batches that were trained on.
        examples: Number of examples in these batches.
        draws: Number of 64-bit random numbers that are drawn before the sampler starts.
    """

    batches: int
    examples: int
    draws: int


class BatchOrders:
    """Draws the orders of examples that DataLoaders would give trainings with other seeds.

    The number of random numbers that a Trainer draws between setting the seed and an epoch (for validation, for
    example) is found by trial and error, by reproducing the order of a recorded training.

    Args:
        begin: Function that starts a training; only the number of examples in its loader's data set matters.
        run: Recorded training that was started in this way.

    Raises:
        CannotStackError: If the recorded order cannot be reproduced.
    """

    def __init__(self, begin: Begin, run: Run) -> None:
        self._begin = begin
        self._epochs: list[Epoch] = []
        _, loader = begin(seed_of(run))
        generator = _generator(loader)
        for number, batches in enumerate(_recorded(run)):
            order = torch.cat(batches)
            before = generator.get_state()
            for draws in (1, *range(_MOST_DRAWS + 1)):  # the usual number first
                generator.set_state(before)
                epoch = Epoch(len(batches), len(order), draws)
                if torch.equal(_order(loader, generator, epoch), order):
                    self._epochs.append(epoch)
                    break
            else:
                raise CannotStackError(
                    f"the order of examples in epoch {number} does not follow from the seed and the DataLoader: "
                    "other random numbers were drawn in between"
                )

    def draw(self, seed: int) -> tuple[pl.LightningModule, Tensor]:
        """Return the untrained module for a seed, and the positions of examples in order ``(examples,)``."""
        module, loader = self._begin(seed)
        generator = _generator(loader)
        return module, torch.cat([_order(loader, generator, epoch) for epoch in self._epochs])


def seed_of(run: Run) -> int:
    """Return the seed of a run that was recorded after ``seed_everything``."""
    assert run.manifest.seed is not None
    return run.manifest.seed


def recorded_order(run: Run) -> Tensor:
    """Return the positions of examples in the order in which a run was trained on them ``(examples,)``."""
    return torch.cat([torch.cat(batches) for batches in _recorded(run)])


def _generator(loader: DataLoader[Any]) -> torch.Generator:
    """Return the generator that a loader draws from."""
    return torch.default_generator if loader.generator is None else loader.generator


def _order(loader: DataLoader[Any], generator: torch.Generator, epoch: Epoch) -> Tensor:
    """Run through an epoch like the iterator of a DataLoader, and return the order of examples."""
    for _ in range(epoch.draws):
        torch.empty((), dtype=torch.int64).random_(generator=generator)
    if (whole := _permutation(loader)) is not None:
        return whole[: epoch.examples]
    batches: Any = islice(iter(loader.batch_sampler), epoch.batches)  # type: ignore[arg-type]
    return torch.from_numpy(np.fromiter(chain.from_iterable(batches), np.int64))


def _permutation(loader: DataLoader[Any]) -> Tensor | None:
    """Return the permutation of a ``RandomSampler``, much faster than by iteration; ``None`` for other samplers."""
    sampler: Any = loader.sampler
    plain = type(loader.batch_sampler) is BatchSampler and loader.batch_sampler.sampler is sampler
    if not plain or type(sampler) is not RandomSampler or sampler.replacement:
        return None
    length = len(sampler.data_source)
    # a generator that belongs to the sampler also advances by what the sampler draws at the end of an epoch
    if sampler.generator is not None or sampler.num_samples != length:
        return None
    generator = torch.Generator()
    generator.manual_seed(int(torch.empty((), dtype=torch.int64).random_()))
    return torch.randperm(length, generator=generator)


def _recorded(run: Run) -> list[list[Tensor]]:
    """Return the recorded batches of each epoch."""
    epochs: dict[int, list[Tensor]] = {}
    for step in range(run.steps):
        for micro_batch in run.micro_batches(step):
            epochs.setdefault(micro_batch.epoch, []).append(micro_batch.indices)
    return list(epochs.values())
