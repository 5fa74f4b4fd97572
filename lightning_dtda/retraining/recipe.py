"""How one training is made: module, data and Trainer, afresh for each seed."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import DataLoader

from lightning_dtda.errors import RetrainingError
from lightning_dtda.recording.configuration import class_path, module_configuration, training_configuration
from lightning_dtda.replay import Examples, dataset_fingerprint, prepare_fit
from lightning_dtda.retraining.dropping import without

Data = pl.LightningDataModule | pl.LightningModule | DataLoader[Any]


@dataclass(frozen=True)
class Recipe:
    """Makes trainings that differ in the seed and in the examples they are without.

    Args:
        make_module: Makes the module, called after the seed is set.
        make_trainer: Makes the Trainer, called after that.
        data: A data module or a DataLoader; or a module, for those that have a ``train_dataloader`` of their own.
    """

    make_module: Callable[[], pl.LightningModule]
    make_trainer: Callable[[], pl.Trainer]
    data: Data

    @classmethod
    def of(cls, module: Any, data: Any, trainer: Any) -> Recipe:
        """Make a recipe of what :func:`~lightning_dtda.retrain` is given.

        Raises:
            RetrainingError: If there is no way to make the module again, or the others are of another kind.
        """
        if not callable(trainer) or isinstance(trainer, pl.Trainer):
            raise RetrainingError(
                f"trainer={trainer!r} is no function that makes a Trainer. A Trainer can fit once: give "
                "trainer=lambda: Trainer(max_epochs=10, logger=False, enable_checkpointing=False), say."
            )
        make_module = _maker(module)
        if data is None:
            with isolate_rng():
                data = make_module()
        if not isinstance(data, (pl.LightningDataModule, pl.LightningModule, DataLoader)):
            raise RetrainingError(
                f"data is a {type(data).__name__}. Give what is trained on with its batch size and order: a "
                "LightningDataModule, or DataLoader(dataset, batch_size=32, shuffle=True)."
            )
        return cls(make_module, trainer, data)

    def module(self) -> pl.LightningModule:
        """Make the module.

        Raises:
            RetrainingError: If it is none.
        """
        module = self.make_module()
        if not isinstance(module, pl.LightningModule):
            raise RetrainingError(
                f"The function that makes the module returned {module!r}. Let it return a LightningModule."
            )
        return module

    def trainer(self) -> pl.Trainer:
        """Make the Trainer.

        Raises:
            RetrainingError: If it is none, was used before, or trains in several processes.
        """
        trainer = self.make_trainer()
        if not isinstance(trainer, pl.Trainer):
            raise RetrainingError(f"The function that makes the Trainer returned {trainer!r}. Let it return a Trainer.")
        if trainer.state.status != TrainerStatus.INITIALIZING:
            raise RetrainingError(
                "The function that makes the Trainer returned one that has fit before. Let it make a new one each time."
            )
        if trainer.world_size > 1:
            raise RetrainingError(
                f"The Trainer spreads a training over {trainer.world_size} processes. Retraining does one training per "
                "process: Trainer(devices=1), and several at a time with workers=..."
            )
        return trainer

    def loader(self) -> DataLoader[Any]:
        """Return the training DataLoader with all examples; no random number is used up.

        Raises:
            RetrainingError: If there is not one map-style DataLoader.
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
        """Describe, in JSON, what is trained on what: what may not differ between the trainings of a ground truth.

        Args:
            loader: The training DataLoader with all examples.

        Raises:
            RetrainingError: If trainings cannot be made, or examples not be dropped.
        """
        with isolate_rng():
            module, trainer = self.module(), self.trainer()
            if self.make_trainer() is trainer:
                raise RetrainingError(
                    "The function that makes the Trainer returns the same one each time, and a Trainer can fit once. "
                    "Let it make a new one."
                )
            without(loader, (0,))
            return {
                "module": module_configuration(module),
                "data": describe_data(loader.dataset),
                "training": training_configuration(trainer, loader),
            }

    def fit(
        self,
        seed: int,
        removed: Collection[int],
        data: dict[str, Any] | None = None,
        callbacks: Collection[pl.Callback] = (),
    ) -> tuple[pl.Trainer, pl.LightningModule]:
        """Train once, as a script does that sets the seed, makes module and Trainer, and fits.

        Args:
            seed: For ``seed_everything``.
            removed: Indices of the examples to train without.
            data: What the data set should be, as :meth:`describe` says it.
            callbacks: To add to the Trainer's.

        Returns:
            The Trainer and the trained module.

        Raises:
            RetrainingError: If the data set is another one.
        """
        pl.seed_everything(seed, workers=True, verbose=False)
        module = self.module()
        trainer = self.trainer()
        trainer.callbacks.extend(callbacks)  # type: ignore[attr-defined]
        source = self.data
        if isinstance(source, DataLoader):
            trainer.fit(module, train_dataloaders=without(source, removed))
        else:
            # the loader is asked of a data module in mid-fit, after its set-up: its method is shadowed till then
            owner = module if isinstance(source, pl.LightningModule) else copy.copy(source)
            original = owner.train_dataloader

            def train_dataloader() -> DataLoader[Any]:
                loader = original()
                left = without(loader, removed)
                _check_data(loader.dataset, data, seed)
                return left

            owner.train_dataloader = train_dataloader  # type: ignore[method-assign]
            trainer.fit(module, datamodule=None if owner is module else owner)  # type: ignore[arg-type]
        if trainer.interrupted:
            raise KeyboardInterrupt
        return trainer, module


def describe_data(dataset: Any) -> dict[str, Any]:
    """Return a data set's class, length and fingerprint; ``None`` for one whose examples differ at each call."""
    fingerprint = dataset_fingerprint(dataset)
    return {
        "class": class_path(type(dataset)),
        "length": len(dataset),
        "fingerprint": fingerprint if fingerprint == dataset_fingerprint(dataset) else None,
    }


def _check_data(dataset: Any, expected: dict[str, Any] | None, seed: int) -> None:
    if expected is None:
        return
    fingerprint = expected["fingerprint"] and dataset_fingerprint(dataset)
    if (len(dataset), fingerprint) != (expected["length"], expected["fingerprint"]):
        raise RetrainingError(
            f"The training data of seed {seed} are another data set than at the start, or in another order, so that an "
            "index does not mean the same example. Let setup and train_dataloader draw no random numbers, or from a "
            "generator of their own: torch.Generator().manual_seed(0)."
        )


def _maker(module: Any) -> Callable[[], pl.LightningModule]:
    if not isinstance(module, pl.LightningModule):
        if not callable(module):
            raise RetrainingError(f"module={module!r}. Give a LightningModule, or a function that makes one.")
        return module
    kind = type(module)
    # LightningCLI adds _class_path and _instantiator
    again = partial(kind, **{key: value for key, value in module.hparams.items() if not key.startswith("_")})
    give = f"Give a function that makes it: module=lambda: {kind.__name__}(...)."
    try:
        with isolate_rng():
            made = again()
    except Exception as error:  # whatever the user's constructor does
        arguments = ", ".join(list(inspect.signature(kind).parameters))
        raise RetrainingError(
            f"{kind.__name__}({arguments}) cannot be made again from its saved hyperparameters "
            f"{sorted(again.keywords)} ({type(error).__name__}: {error}). {give}"
        ) from error
    # the same layers with the same parameters; which values they have is up to the seed
    if _form(made) != _form(module):
        raise RetrainingError(
            f"A {kind.__name__} that is made from its saved hyperparameters {sorted(again.keywords)} is another "
            f"one than this: call self.save_hyperparameters() in its constructor, or {give[0].lower()}{give[1:]}"
        )
    return again


def _form(module: pl.LightningModule) -> Any:
    parameters = [(name, p.shape, p.dtype, p.requires_grad) for name, p in module.named_parameters()]
    return repr(module), parameters
