"""The list of cases, to be read without importing any of the packages that they come from."""

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pytest
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, callbacks, seed_everything
from torch.utils.data import DataLoader, Dataset


@dataclass(frozen=True)
class Case:
    """A module with its training data, and what is known about it.

    The file ``tests/zoo/<source>.py`` holds two functions for it: ``<name>()`` makes the module and the training data,
    drawing initial weights from the global generators; ``<name>_queries()`` makes a few more items of the same format,
    which the training loader's ``collate_fn`` puts together. The examples are the same for every seed.

    Args:
        name: What the case is called, and the function that makes it.
        source: The file that holds it.
        requires: The packages without which it is skipped.
        trainer_kwargs: How the Trainer is to be set up: length, clipping and the like.
        callbacks: Makes the callbacks that the training has; they hold its state, so each training needs new ones.
        precision64: Trains under ``Trainer(precision="64-true")`` as it is; where not, ``make(seed, float64=True)``
            does.
        float32_inside: Computes something between parameters and loss in float32 whatever the parameters' dtype, so
            that finite differences are good to about 1e-4 only.
        random: Generators that a step, or the loading of its items, draws from: torch, numpy, python. Shuffling, which
            every case draws from torch, does not count.
        unused: Beginnings of the names of the parameters that require a gradient and get none.
        lightning: The package that the module's own base class comes from, ``lightning.pytorch`` or
            ``pytorch_lightning``; each Trainer takes modules of its own package only.
    """

    name: str
    source: str
    requires: tuple[str, ...] = ()
    trainer_kwargs: Mapping[str, Any] = field(default_factory=lambda: {"max_epochs": 2})
    callbacks: Callable[[], list[Callback]] = list
    precision64: bool = True
    float32_inside: bool = False
    random: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    lightning: str = "lightning.pytorch"

    def make(self, seed: int, float64: bool = False) -> tuple[LightningModule, DataLoader | LightningDataModule]:
        """The module, with the weights that belong to the seed, and its training data.

        Seeds the global generators as a training script does in its first line, and leaves them as that script would.

        Args:
            seed: The training's seed.
            float64: Make batches that a Trainer with ``precision="64-true"`` can use. It turns the module to float64
                and the tensors that it finds in a batch; objects of which it knows nothing it leaves in float32, and
                the case's file converts them after they are collated, by ``in_float64(batch)``.
        """
        seed_everything(seed, verbose=False)
        module, data = getattr(self._file, self.name)()
        convert = getattr(self._file, "in_float64", None)
        if float64 and convert is not None:
            collate = data.collate_fn
            data.collate_fn = lambda items: convert(collate(items))
        return module, data

    def queries(self) -> Dataset:
        """A few items, not among the training examples, in the format of the training items."""
        return getattr(self._file, f"{self.name}_queries")()

    def trainer(self, *more: Callback, **arguments: Any) -> Trainer:
        """A quiet Trainer on the CPU with the case's settings and ``more`` callbacks; ``arguments`` take precedence."""
        settings = {
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **self.trainer_kwargs,
            **arguments,
        }
        return self._package.Trainer(callbacks=[*self.callbacks(), *more], **settings)

    def callback(self, **hooks: Callable) -> Callback:
        """A callback for the case's Trainer; ``hooks`` take what the hooks of that name are given."""
        return type("Hooks", (self._package.Callback,), {name: staticmethod(hook) for name, hook in hooks.items()})()

    def skip_unless_installed(self) -> None:
        """Skip the running test if one of the packages is missing."""
        missing = [package for package in self.requires if importlib.util.find_spec(package) is None]
        if missing:
            pytest.skip(f"needs {', '.join(missing)}")

    @property
    def _file(self) -> ModuleType:
        return importlib.import_module(f"tests.zoo.{self.source}")

    @property
    def _package(self) -> ModuleType:
        return importlib.import_module(self.lightning)


def _moving_average() -> list[Callback]:
    """An average of the weights, kept beside; Lightning has it since 2.6."""
    average = getattr(callbacks, "EMAWeightAveraging", None)
    return [] if average is None else [average(decay=0.9)]


CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case(
            "demo_transformer", "plain", random=("torch",), trainer_kwargs={"max_epochs": 2, "gradient_clip_val": 0.5}
        ),
        Case("diffusion", "plain", random=("torch",), callbacks=_moving_average),
        Case("packed_lstm", "plain", random=("torch",), trainer_kwargs={"max_epochs": 2, "gradient_clip_val": 1.0}),
        Case("packed_gru", "plain", random=("torch",)),
        Case("vae", "plain", random=("torch",)),
        Case("weighted_cnn", "plain", random=("torch",), trainer_kwargs={"max_steps": 10}),
        Case("augmented_items", "plain", random=("torch", "numpy")),
        Case("contrastive", "plain", random=("torch",)),
        Case("mixup", "plain", random=("torch", "numpy")),
        Case("bookkeeping", "plain"),
        Case("trainer_aware", "plain", random=("torch", "python")),
        Case("bert", "transformers_text", ("transformers", "peft"), random=("torch",)),
        Case("gpt2", "transformers_text", ("transformers", "peft"), random=("torch",), float32_inside=True),
        Case("bert_lora", "transformers_text", ("transformers", "peft"), random=("torch",)),
        Case("gpt2_lora", "transformers_text", ("transformers", "peft"), random=("torch",), float32_inside=True),
        Case("timm_vit", "timm_images", ("timm",), random=("torch",)),
        Case("timm_resnet", "timm_images", ("timm",), random=("torch",)),
        Case("gin", "graphs", ("torch_geometric",), random=("torch",)),
        Case("gcn", "graphs", ("torch_geometric",), random=("torch",), precision64=False),
        Case("chemprop", "molecules", ("chemprop",), random=("torch",), precision64=False),
        Case("chemprop_batch_norm", "molecules", ("chemprop",), random=("torch",), precision64=False),
        Case(
            "temporal_fusion_transformer",
            "series",
            ("pytorch_forecasting",),
            random=("torch",),
            trainer_kwargs={"max_epochs": 2, "gradient_clip_val": 0.1},
        ),
        Case(
            "nhits",
            "series",
            ("pytorch_forecasting",),
            random=("torch",),
            trainer_kwargs={"max_epochs": 2, "gradient_clip_val": 0.1},
        ),
        Case("neuralforecast_nhits", "windows", ("neuralforecast",), random=("torch",), lightning="pytorch_lightning"),
        Case("scvi", "cells", ("scvi",), random=("torch",), unused=("module.l_encoder", "module.decoder.px_r_decoder")),
        Case(
            "scvi_items",
            "cells",
            ("scvi",),
            random=("torch",),
            unused=("module.l_encoder", "module.decoder.px_r_decoder"),
        ),
        Case("tabular", "tables", ("pytorch_tabular",), random=("torch",), lightning="pytorch_lightning"),
    )
}

REFUSED = {"neuralforecast_nhits": "has a row for each example"}
"""Its step draws windows of series across the batch, so that no row of the loss belongs to an example."""

RANDOM_ITEMS = {"augmented_items"}
"""The data set draws each time it is asked: the batches themselves are recorded."""
