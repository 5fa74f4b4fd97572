"""32 points in one dimension: two groups, a gap between them, and a single point in the gap.

Nothing here is specific to attribution.
"""

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

ISOLATED = 16
"""The point in the gap; 0 to 15 are on its left, 17 to 31 on its right."""
TARGET = -0.19
"""Its target: what networks that were trained without it predict there, on average over other seeds."""


def data() -> tuple[Tensor, Tensor]:
    """Return inputs ``(32, 1)`` and targets ``(32,)``: values of a sine with noise, except for the isolated point."""
    inputs = torch.cat([torch.linspace(-2, -0.7, 16), torch.zeros(1), torch.linspace(0.7, 2, 15)])
    noise = torch.randn(32, generator=torch.Generator().manual_seed(0))
    targets = (2 * inputs).sin() + 0.2 * noise
    targets[ISOLATED] = TARGET
    return inputs[:, None], targets


class Points(pl.LightningDataModule):
    """The points in shuffled batches.

    Args:
        batch_size: Number of examples in a batch.
    """

    def __init__(self, batch_size: int = 8) -> None:
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        """Make the data set."""
        self.train = TensorDataset(*data())

    def train_dataloader(self) -> DataLoader:
        """Return shuffled batches."""
        return DataLoader(self.train, self.batch_size, shuffle=True)


class Curve(pl.LightningModule):
    """A 1-64-64-1 network, squared error, SGD with momentum and a cosine schedule.

    Args:
        width: Number of units in a hidden layer.
        learning_rate: Learning rate of the first step.
    """

    def __init__(self, width: int = 64, learning_rate: float = 0.05) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = nn.Sequential(
            nn.Linear(1, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1)
        )

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the function's values ``(B,)`` at inputs ``(B, 1)``."""
        return self.network(inputs).squeeze(-1)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the mean squared error."""
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def configure_optimizers(self):
        """Return SGD with a learning rate that falls to zero over the training."""
        optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams.learning_rate, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
