"""Compressive strength of 1,030 concretes (Yeh, 1998; UCI Machine Learning Repository), by a small network."""

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class ConcreteData(pl.LightningDataModule):
    """The table's eight inputs and the strength, standardised; a tenth of the rows is for validation.

    Args:
        path: Path of the table as text: 1,030 rows and nine columns, the last of which is the strength in MPa.
        batch_size: Number of examples in a batch.
    """

    feature_names = ("cement", "slag", "ash", "water", "plasticizer", "gravel", "sand", "age")

    def __init__(self, path: str, batch_size: int = 32) -> None:
        super().__init__()
        self.path = path
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        """Load, shuffle and split the rows, in the same way for every seed."""
        rows = torch.as_tensor(np.loadtxt(self.path), dtype=torch.float32)
        rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
        train, validation = rows[: len(rows) * 9 // 10], rows[len(rows) * 9 // 10 :]
        mean, std = train.mean(0), train.std(0)
        self.train, self.validation = (
            TensorDataset(part[:, :-1], part[:, -1]) for part in ((train - mean) / std, (validation - mean) / std)
        )

    def train_dataloader(self) -> DataLoader:
        """Return shuffled batches of equal size."""
        return DataLoader(self.train, self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        """Return the whole validation set as one batch."""
        return DataLoader(self.validation, len(self.validation))


class ConcreteRegressor(pl.LightningModule):
    """An 8-64-64-1 ReLU network, squared error, SGD with a cosine schedule.

    Args:
        width: Number of units in a hidden layer.
        learning_rate: Learning rate of the first step.
    """

    def __init__(self, width: int = 64, learning_rate: float = 0.05) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = nn.Sequential(
            nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1)
        )

    def forward(self, inputs: Tensor) -> Tensor:
        """Predict the standardised strength ``(B,)`` from eight inputs ``(B, 8)``."""
        return self.network(inputs).squeeze(-1)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the mean squared error."""
        loss = nn.functional.mse_loss(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the mean squared error."""
        self.log("val_loss", nn.functional.mse_loss(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        """Return SGD with a learning rate that falls to zero over the training."""
        optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
