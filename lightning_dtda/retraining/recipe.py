"""How to make one training: new module, data and Trainer for each seed."""

from __future__ import annotations

import copy
import inspect
import random
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import DataLoader

from lightning_dtda.errors import RetrainingError
from lightning_dtda.execution.fitting import fit
from lightning_dtda.recording.configuration import class_path, module_configuration, training_configuration
from lightning_dtda.replay import Examples, dataset_fingerprint, prepare_fit
from lightning_dtda.retraining.dropping import without

Data = pl.LightningDataModule | pl.LightningModule | DataLoader[Any]


@dataclass(frozen=True)
class Recipe:
    """Makes trainings that differ in the seed and in the removed examples.

    Args:
        make_module: Function that creates the module, called after the seed is set.
        make_trainer: Function that creates the Trainer, called after ``make_module``.
        data: A data module or a DataLoader, or a module that has a ``train_dataloader`` method.
    """

    make_module: Callable[[], pl.LightningModule]
    make_trainer: Callable[[], pl.Trainer]
    data: Data

    @classmethod
    def of(cls, module: Any, data: Any, trainer: Any) -> Recipe:
        """Create a recipe from the arguments of :func:`~lightning_dtda.retrain`.

        Raises:
            RetrainingError: If the module cannot be created again, or data or trainer have the wrong type.
        """
        if not callable(trainer) or isinstance(trainer, pl.Trainer):
            raise RetrainingError(
                f"trainer={trainer!r} is not a function that creates a Trainer. A Trainer can fit only once: pass for "
                "example trainer=lambda: Trainer(max_epochs=10, logger=False, enable_checkpointing=False)."
            )
        make_module = _maker(module)
        if data is None:
            with isolate_rng():
                data = make_module()
        if not isinstance(data, (pl.LightningDataModule, pl.LightningModule, DataLoader)):
            raise RetrainingError(
                f"data is a {type(data).__name__}. Pass the training data with batch size and order: a "
                "LightningDataModule, or DataLoader(dataset, batch_size=32, shuffle=True)."
            )
        return cls(make_module, trainer, data)

    def module(self) -> pl.LightningModule:
        """Create the module.

        Raises:
            RetrainingError: If the function does not return a LightningModule.
        """
        module = self.make_module()
        if not isinstance(module, pl.LightningModule):
            raise RetrainingError(
                f"The function that creates the module returned {module!r}. Let it return a LightningModule."
            )
        return module

    def trainer(self) -> pl.Trainer:
        """Create the Trainer.

        Raises:
            RetrainingError: If the function does not return a Trainer, or the Trainer was used before or trains in
                several processes.
        """
        trainer = self.make_trainer()
        if not isinstance(trainer, pl.Trainer):
            raise RetrainingError(f"The trainer function returned {trainer!r}. Let it return a Trainer.")
        if trainer.state.status != TrainerStatus.INITIALIZING:
            raise RetrainingError(
                "The trainer function returned a Trainer that was already used. Let it create a new one each time."
            )
        if trainer.world_size > 1:
            raise RetrainingError(
                f"The Trainer spreads a training over {trainer.world_size} processes, but retraining runs each "
                "training in one process. Set Trainer(devices=1), and run several trainings at a time with workers=..."
            )
        return trainer

    def loader(self) -> DataLoader[Any]:
        """Return the training DataLoader with all examples, without changing the random state.

        Raises:
            RetrainingError: If there is not exactly one DataLoader with a map-style data set.
        """
        data = self.data
        with isolate_rng():
            if not isinstance(data, DataLoader):
                data = copy.copy(data)
                prepare_fit(data)
                data = data.train_dataloader()
        return without(data, ())

    def examples(self, loader: DataLoader[Any]) -> Examples:
        """Return the examples of the training DataLoader."""
        datamodule = self.data if isinstance(self.data, pl.LightningDataModule) else None
        return Examples(loader.dataset, loader.collate_fn, datamodule=datamodule)

    def describe(self, loader: DataLoader[Any]) -> dict[str, Any]:
        """Describe, as JSON, module, data and training, which must be the same in all trainings of a ground truth.

        Args:
            loader: The training DataLoader with all examples.

        Raises:
            RetrainingError: If trainings cannot be created, or examples cannot be dropped.
        """
        with isolate_rng():
            module, trainer = self.module(), self.trainer()
            if self.make_trainer() is trainer:
                raise RetrainingError(
                    "The trainer function returns the same Trainer each time, but a Trainer can fit only once. Let it "
                    "create a new one."
                )
            without(loader, (0,))
            return {
                "module": module_configuration(module),
                "data": data_facts(loader.dataset),
                "training": training_configuration(trainer, loader),
            }

    def fit(
        self,
        seed: int,
        removed: Collection[int],
        data: dict[str, Any] | None = None,
        callbacks: Collection[pl.Callback] = (),
    ) -> tuple[pl.Trainer, pl.LightningModule]:
        """Train once, like a script that sets the seed, creates module and Trainer, and fits.

        Args:
            seed: Seed for ``seed_everything``.
            removed: Indices of the examples to train without.
            data: Expected data set, as described by :meth:`describe`.
            callbacks: Callbacks to add to those of the Trainer.

        Returns:
            The Trainer and the trained module.

        Raises:
            RetrainingError: If the data set is not the expected one.
        """
        pl.seed_everything(seed, workers=True, verbose=False)
        module = self.module()
        trainer = self.trainer()
        trainer.callbacks.extend(callbacks)  # type: ignore[attr-defined]
        source = self.data
        if isinstance(source, DataLoader):
            fit(trainer, module, without(source, removed))
        else:
            # the Trainer asks the data module for its loader during fit, after its setup: shadow the method until then
            owner = module if isinstance(source, pl.LightningModule) else copy.copy(source)
            original = owner.train_dataloader

            def train_dataloader() -> DataLoader[Any]:
                loader = original()
                left = without(loader, removed)
                _check_data(loader.dataset, data, seed)
                return left

            owner.train_dataloader = train_dataloader  # type: ignore[method-assign]
            fit(trainer, module, None if owner is module else owner)
        return trainer, module


def data_facts(dataset: Any) -> dict[str, Any]:
    """Return a data set's class, length and fingerprint, which is ``None`` if examples differ at each call."""
    fingerprint = dataset_fingerprint(dataset)
    with isolate_rng():
        # the fingerprint restores the generators, so that random augmentation would be the same a second time
        random.random()
        np.random.random()
        torch.rand(())
        again = dataset_fingerprint(dataset)
    return {
        "class": class_path(type(dataset)),
        "length": len(dataset),
        "fingerprint": fingerprint if fingerprint == again else None,
    }


def _check_data(dataset: Any, expected: dict[str, Any] | None, seed: int) -> None:
    if expected is None:
        return
    fingerprint = expected["fingerprint"] and dataset_fingerprint(dataset)
    if (len(dataset), fingerprint) != (expected["length"], expected["fingerprint"]):
        raise RetrainingError(
            f"The training data with seed {seed} differ from those at the start, or their order does, so an index does "
            "not mean the same example. Let setup and train_dataloader draw no random numbers, or draw them from a "
            "separate generator: torch.Generator().manual_seed(0)."
        )


def _maker(module: Any) -> Callable[[], pl.LightningModule]:
    if not isinstance(module, pl.LightningModule):
        if not callable(module):
            raise RetrainingError(f"module={module!r} must be a LightningModule, or a function that creates one.")
        return module
    kind = type(module)
    # LightningCLI adds _class_path and _instantiator
    again = partial(kind, **{key: value for key, value in module.hparams.items() if not key.startswith("_")})
    give = f"Pass a function that creates it: module=lambda: {kind.__name__}(...)."
    try:
        with isolate_rng():
            made = again()
    except Exception as error:  # any error in the user's constructor
        arguments = ", ".join(list(inspect.signature(kind).parameters))
        raise RetrainingError(
            f"{kind.__name__}({arguments}) cannot be created again from its saved hyperparameters "
            f"{sorted(again.keywords)} ({type(error).__name__}: {error}). {give}"
        ) from error
    # the same layers with the same parameters; their values depend on the seed
    if _form(made) != _form(module):
        raise RetrainingError(
            f"A {kind.__name__} that is created from the saved hyperparameters {sorted(again.keywords)} differs from "
            f"this one: call self.save_hyperparameters() in its constructor, or {give[0].lower()}{give[1:]}"
        )
    return again


def _form(module: pl.LightningModule) -> Any:
    parameters = [(name, p.shape, p.dtype, p.requires_grad) for name, p in module.named_parameters()]
    return repr(module), parameters
