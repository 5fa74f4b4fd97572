"""Vision models of timm on scikit-learn's digits."""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import lightning.pytorch as pl
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from tests.zoo.data import QUERIES, digits, loader

_TORCHVISION = [
    "torchvision",
    "torchvision.datasets",
    "torchvision.models",
    "torchvision.models.feature_extraction",
    "torchvision.ops",
    "torchvision.ops.misc",
    "torchvision.transforms",
    "torchvision.transforms.functional",
]
"""The parts of torchvision that timm imports when it is imported itself."""


class _Empty(type):
    """The type of classes that hold nothing but names."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Absent(ModuleType):
    """A module that has whatever is asked of it, as an empty class."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return sys.modules.get(f"{self.__name__}.{name}") or _Empty(name, (), {})


@contextmanager
def _torchvision_or_nothing() -> Iterator[None]:
    """Let timm be imported without torchvision.

    timm imports it for data sets, transforms and one frozen norm, none of which is used here; and beside the CPU build
    of torch the torchvision of PyPI fails to import. Afterwards nobody else finds what stood in for it.
    """
    absent = [] if importlib.util.find_spec("torchvision") else _TORCHVISION
    sys.modules.update({name: _Absent(name) for name in absent})
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


with _torchvision_or_nothing():
    import timm


class ImageClassifier(pl.LightningModule):
    """Trains a model of timm by cross entropy with cosine annealing over the whole training."""

    def __init__(self, model: nn.Module, learning_rate: float):
        super().__init__()
        self.save_hyperparameters(ignore="model")
        self.model = model

    def forward(self, images):
        return self.model(images)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        loss = functional.cross_entropy(self(images), labels, label_smoothing=0.1)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.learning_rate, weight_decay=0.05)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.max_epochs)
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


def timm_vit():
    """A vision transformer with dropout and dropped paths; its patches are 2 pixels wide."""
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=8,
        patch_size=2,
        in_chans=1,
        num_classes=10,
        embed_dim=32,
        depth=2,
        num_heads=4,
        mlp_ratio=2.0,
        drop_rate=0.1,
        drop_path_rate=0.2,
    )
    return ImageClassifier(model, 2e-3), loader(TensorDataset(*digits(0, 40)))


def timm_vit_queries():
    return TensorDataset(*digits(40, 40 + QUERIES))


def _enlarged(first: int, last: int) -> TensorDataset:
    images, labels = digits(first, last)
    return TensorDataset(functional.interpolate(images, size=16, mode="bilinear"), labels)


def timm_resnet():
    """A residual network with BatchNorm and dropped paths, its channels few."""
    model = timm.create_model(
        "resnet10t",
        in_chans=1,
        num_classes=10,
        stem_width=4,
        channels=(8, 8, 16, 16),
        output_stride=8,
        drop_path_rate=0.1,
    )
    return ImageClassifier(model, 5e-3), loader(_enlarged(0, 40))


def timm_resnet_queries():
    return _enlarged(40, 40 + QUERIES)
