"""A residual network on CIFAR-10, for a GPU. Nothing here is specific to attribution."""

import pickle
from pathlib import Path

import numpy as np
import torch
from torch import nn

from examples.pruning.vision import CLASSES, Augmented, Classifier, Images


class CIFAR10(Images):
    """CIFAR-10 from its Python version: the last images, those of ``test_batch``, are the test.

    Args:
        folder: Folder with the files ``data_batch_1`` to ``data_batch_5`` and ``test_batch``.
        noise: Share of the training labels that are changed.
        train: Number of training images.
        validation: Number of validation images.
        batch_size: Size of a batch.
    """

    def __init__(
        self, folder: str, noise: float = 0.0, train: int = 48000, validation: int = 2000, batch_size: int = 250
    ) -> None:
        super().__init__(noise, train, validation, batch_size)
        self.save_hyperparameters()

    def read(self):
        """Return standardised images ``(N, 3, 32, 32)`` and labels."""
        images, labels = [], []
        for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
            # these files are pickles, which can run code: take them from a source that you trust
            found = pickle.loads(Path(self.hparams.folder, name).read_bytes(), encoding="bytes")
            images.append(torch.from_numpy(found[b"data"]).view(-1, 3, 32, 32).float() / 255)
            labels.append(torch.from_numpy(np.array(found[b"labels"])))
        return (torch.cat(images) - 0.47) / 0.25, torch.cat(labels)

    def augment(self, images, labels):
        """Return the images shifted by up to four pixels and mirrored."""
        return Augmented(images, labels, pixels=4, mirror=True)


class Convolution(nn.Sequential):
    """Convolution, batch normalisation, ReLU, and a pooling that halves the image if wanted."""

    def __init__(self, inputs, outputs, pool=False):
        layers = [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        super().__init__(*layers, *([nn.MaxPool2d(2)] if pool else []))


class Residual(nn.Module):
    """Two convolutions, added to their input."""

    def __init__(self, width):
        super().__init__()
        self.inner = nn.Sequential(Convolution(width, width), Convolution(width, width))

    def forward(self, images):
        """Return images of the same shape."""
        return images + self.inner(images)


class ResNet9(Classifier):
    """Eight convolutions and a linear layer."""

    def __init__(self, width: int = 64, learning_rate: float = 0.002, weight_decay: float = 0.05) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            Convolution(3, width),
            Convolution(width, 2 * width, pool=True),
            Residual(2 * width),
            Convolution(2 * width, 4 * width, pool=True),
            Convolution(4 * width, 8 * width, pool=True),
            Residual(8 * width),
            nn.AdaptiveMaxPool2d(1),
            nn.Flatten(),
            nn.Linear(8 * width, CLASSES),
        )

    def forward(self, images):
        """Return class scores ``(B, classes)``."""
        return self.net(images)
