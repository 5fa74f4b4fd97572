"""Seeds of the sources of a training's randomness, set apart, so that each can vary while the others stay."""

from __future__ import annotations

import hashlib
import itertools
import math
import operator
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import numpy as np
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_dtda.errors import RecordingError
from lightning_dtda.replay.random_states import GENERATORS, Generator, Generators, seed_generator
from lightning_dtda.trajectory.manifest import Source

LIMIT = 1000
"""Seeds of a source are below it: the seed of a run has three decimal digits for each source."""


@dataclass(frozen=True)
class RunSeeds:
    """Seeds of the sources for one run.

    Args:
        run: Seed of the run, which names it.
        crossed: Seed of each source that the ensemble varies.
    """

    run: int
    crossed: dict[Source, int]

    def of(self, source: Source) -> int:
        """Return the seed of a source; a source that is not crossed has one of its own in each run."""
        seed = self.crossed.get(source, self.run)
        if source == "initialisation":
            return seed  # the same initial parameters as those of an ordinary run with this seed
        # other numbers: with the same ones, initial parameters and order would depend on each other
        return _hashed(f"{source} {seed}")


@dataclass(frozen=True)
class CrossedSeeds:
    r"""Seeds of the sources of randomness, each combined with each: a crossed ensemble.

    .. math:: m^{(i, j, k)}, \qquad i \in \text{initialisation},\; j \in \text{order},\; k \in \text{noise}

    The runs with the same seed of a source share what it decides, so the variance of a measurement can be split by
    source: :meth:`Attribution.variance_by_source <lightning_dtda.Attribution.variance_by_source>`.

    Args:
        initialisation: Seeds of the parameters' initial values, and of all that is drawn before the training data are
            loaded: a number S for the seeds 0 to S - 1, or a list. ``None``: a seed of its own in each run.
        order: Seeds of the batches: which examples, in which order. As above.
        noise: Seeds of what is drawn during training: dropout, noise in ``training_step``, augmentation. As above.

    Raises:
        RecordingError: If fewer than two sources have several seeds, or seeds are invalid: not numbers from 0 to 999,
            or given twice.

    Example:
        >>> [(seeds.run, seeds.crossed) for seeds in CrossedSeeds(initialisation=2, order=[0, 7]).runs()]
        ... # doctest: +NORMALIZE_WHITESPACE
        [(0, {'initialisation': 0, 'order': 0}), (1, {'initialisation': 1, 'order': 0}),
         (7000, {'initialisation': 0, 'order': 7}), (7001, {'initialisation': 1, 'order': 7})]
    """

    initialisation: int | list[int] | None = None
    order: int | list[int] | None = None
    noise: int | list[int] | None = None

    def __post_init__(self) -> None:
        if sum(len(seeds) > 1 for seeds in self.levels.values()) < 2:
            raise RecordingError(
                "The variance can be split only between sources that both vary. Give two or more of initialisation, "
                "order and noise several seeds each, such as initialisation=8, order=8."
            )

    @property
    def levels(self) -> dict[Source, list[int]]:
        """Seeds of each source that is crossed."""
        given: dict[Source, int | list[int] | None] = {
            "initialisation": self.initialisation,
            "order": self.order,
            "noise": self.noise,
        }
        return {source: _checked(source, seeds) for source, seeds in given.items() if seeds is not None}

    def runs(self) -> list[RunSeeds]:
        """Return the seeds of each run, so ordered that the first ones combine few seeds of each source.

        A recording that stops early then leaves combinations of all sources, and what goes wrong shows after few runs.
        """
        levels = self.levels
        found = []
        numbers = itertools.product(*(range(len(seeds)) for seeds in reversed(levels.values())))
        # among those with a further seed, first the ones that differ from the first run in one source alone
        for combined in sorted(numbers, key=lambda combined: (max(combined), sum(map(bool, combined)))):
            chosen = zip(levels.items(), reversed(combined), strict=True)
            crossed = {source: seeds[number] for (source, seeds), number in chosen}
            found.append(RunSeeds(sum(seed * _PLACES[source] for source, seed in crossed.items()), crossed))
        return found

    def of_run(self, seed: int) -> RunSeeds:
        """Return the seeds of the sources for the run with a seed."""
        return RunSeeds(seed, {source: seed // _PLACES[source] % LIMIT for source in self.levels})

    def __len__(self) -> int:
        return math.prod(map(len, self.levels.values()))


_PLACES = {source: LIMIT**number for number, source in enumerate(get_args(Source))}
"""Factor of each source's seed in the seed of a run: 3 of initialisation and 12 of order make 12003."""


def _checked(source: str, seeds: int | Sequence[int]) -> list[int]:
    try:
        chosen = list(range(seeds)) if isinstance(seeds, int) else [operator.index(seed) for seed in seeds]
    except TypeError:
        chosen = []
    if not chosen or len(set(chosen)) != len(chosen) or min(chosen) < 0 or max(chosen) >= LIMIT:
        raise RecordingError(
            f"{source}={seeds!r} must be a number of seeds, at most {LIMIT}, or a list of different seeds from 0 to "
            f"{LIMIT - 1}."
        )
    return chosen


class OrderStream:
    """The random numbers of the batches' order, apart from those of the training.

    Only generators on the CPU take part: samplers draw from no others, and those of a GPU belong to the noise.

    Args:
        seeds: Seeds of the run.
    """

    def __init__(self, seeds: RunSeeds) -> None:
        self._seed = seeds.of("order")
        self._seeded = 0
        self._without_generator: list[tuple[DataLoader[Any], torch.Generator]] = []
        before = _states()
        torch.default_generator.manual_seed(self._seed)  # torch.manual_seed would seed those of a GPU, too
        np.random.seed(self._seed)
        random.seed(self._seed)
        self._states = _states()
        _set(before)

    @contextmanager
    def drawing(self, all_generators: bool = True) -> Iterator[None]:
        """Let the global generators continue this stream inside, and what they had before afterwards.

        Args:
            all_generators: Whether those of NumPy and Python may be drawn from. It takes 0.2 ms, and 6 microseconds for
                torch's alone.
        """
        before = _states(all_generators)
        _set(self._states[: len(before)])
        try:
            yield
        finally:  # also at the end of an epoch, a StopIteration, before which a sampler may draw the next one
            self._states = _states(all_generators) + self._states[len(before) :]
            _set(before)

    def begin(self, loader: DataLoader[Any]) -> None:
        """Seed the generators that the samplers of a loader own, and let its workers' seeds be noise until the end."""
        self.seed_samplers(loader)
        if loader.generator is not None and loader.num_workers > 0:
            # the seeds of the workers would be drawn from the generator of the order
            self._without_generator.append((loader, loader.generator))
            loader.generator = None

    def seed_samplers(self, loader: DataLoader[Any]) -> None:
        """Seed the generators that the samplers of a loader own."""
        for generator in _owned(loader.sampler, loader.batch_sampler):
            self._seeded += 1  # the seed itself is that of the global ones
            seed_generator(generator, self._seed + self._seeded)

    def end(self) -> None:
        """Restore the loaders."""
        for loader, generator in self._without_generator:
            loader.generator = generator
        self._without_generator.clear()

    def take_over(self) -> None:
        """Let the global generators continue this stream from now on."""
        _set(self._states)


class NoiseStream:
    """The random numbers drawn during training, on the CPU and on GPUs.

    Where several runs share them, they start anew with each batch. A step then draws the same numbers in all of them,
    however many the steps before drew: padded to other lengths, batches drop out other numbers of values.

    Args:
        seeds: Seeds of the run.
        module: The module, whose own generators belong to the noise, too.
    """

    def __init__(self, seeds: RunSeeds, module: nn.Module) -> None:
        self._seed = seeds.of("noise")
        self._is_shared = "noise" in seeds.crossed
        self._counts = {"batch": 0, "items": 0, "workers": 0}
        self._is_elsewhere = any(part.device.type not in ("cpu", "cuda") for part in module.parameters())
        # without seeds of the noise, generators that the module owns are left as the module seeds them
        Generators(module if self._is_shared else nn.Module(), torch.device("cpu")).seed(self._seed)

    def begin(self, what: Literal["batch", "items", "workers"], generators: Generators | None = None) -> None:
        """Start anew if runs share these numbers.

        Args:
            what: What draws next: the passing of a batch through the module, the reading of a batch's items in this
                process, or the workers of a new iterator, which follow a number drawn here.
            generators: Generators of the module, if these are to start anew, too.
        """
        if not self._is_shared:
            return
        self._counts[what] += 1
        seed = _hashed(f"{what} {self._counts[what]} of {self._seed}")
        if self._is_elsewhere:
            torch.manual_seed(seed)
        else:  # without the 0.2 ms that torch.manual_seed spends on a GPU that is not used
            torch.default_generator.manual_seed(seed)
            if torch.cuda.is_initialized():
                torch.cuda.manual_seed_all(seed)
        # also if they were not drawn from yet: in another run that shares these numbers they may have been
        np.random.seed(seed)
        random.seed(seed)
        if generators is not None:
            generators.seed_own(seed)


def _states(all_generators: bool = True) -> tuple[Any, ...]:
    """Return the states of the global generators, that of torch first."""
    of_torch = torch.get_rng_state()
    return (of_torch, np.random.get_state(), random.getstate()) if all_generators else (of_torch,)


def _set(states: tuple[Any, ...]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        np.random.set_state(states[1])
        random.setstate(states[2])


_OF_TORCH = (RandomSampler, SequentialSampler, SubsetRandomSampler, WeightedRandomSampler)


def draws_from_torch(sampler: Any) -> bool:
    """Return whether a batch sampler draws from no other generator than torch's, as those of torch itself."""
    return type(sampler.sampler if type(sampler) is BatchSampler else sampler) in _OF_TORCH


_MOST_INSIDE = 1000
"""Maximum number of entries of a list or dict in which generators are sought."""


def _owned(*samplers: Any) -> list[Generator]:
    """Return the generators that are attributes of samplers, of those inside of them, and in their lists and dicts."""
    found: dict[int, Generator] = {}
    seen: set[int] = set()

    def look(sampler: Any) -> None:
        if id(sampler) in seen or not hasattr(sampler, "__dict__"):
            return
        seen.add(id(sampler))
        for value in vars(sampler).values():
            several = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
            # few, as a list may have all indices of the data
            for one in (value, *itertools.islice(several, _MOST_INSIDE)):
                if isinstance(one, GENERATORS):
                    found[id(one)] = one
                # any iterable can be a sampler
                elif hasattr(type(one), "__iter__") and not isinstance(one, (Dataset, torch.Tensor, nn.Module)):
                    look(one)

    for sampler in samplers:
        look(sampler)
    return list(found.values())


def _hashed(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def seed_training(seed: int, crossed: CrossedSeeds | None = None) -> RunSeeds | None:
    """Set the seeds before a training is created, and return those of its sources if they are set apart."""
    if crossed is None:
        pl.seed_everything(seed, workers=True, verbose=False)
        return None
    seeds = crossed.of_run(seed)
    pl.seed_everything(seeds.of("initialisation"), workers=True, verbose=False)
    os.environ["PL_GLOBAL_SEED"] = str(seed)  # the run is named after it
    return seeds
