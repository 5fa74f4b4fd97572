"""Disease progression of 442 diabetes patients (Efron, Hastie, Johnstone and Tibshirani, 2004), by a small network."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class DiabetesData(pl.LightningDataModule):
    """Scikit-learn's bundled diabetes data, standardised; every fifth patient is for validation.

    Args:
        batch_size: Examples in a batch.
    """

    def __init__(self, batch_size: int = 32) -> None:
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        """Load and split the data; always alike, whatever the seed."""
        from sklearn.datasets import load_diabetes

        inputs, targets = load_diabetes(return_X_y=True)
        inputs, targets = (torch.as_tensor(array, dtype=torch.float32) for array in (inputs, targets))
        validation = torch.arange(len(inputs)) % 5 == 0
        self.train, self.validation = (
            TensorDataset(
                (inputs[part] - inputs[~validation].mean(0)) / inputs[~validation].std(0),
                (targets[part] - targets[~validation].mean()) / targets[~validation].std(),
            )
            for part in (~validation, validation)
        )

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Shuffled batches."""
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """All of the validation set."""
        return DataLoader(self.validation, len(self.validation))


class DiabetesRegressor(pl.LightningModule):
    """A network with two hidden layers, squared error, SGD with momentum and a cosine schedule.

    Args:
        width: Units in a hidden layer.
        learning_rate: Of the first step.
        momentum: Of SGD.
        weight_decay: Of SGD.
    """

    def __init__(
        self, width: int = 32, learning_rate: float = 0.02, momentum: float = 0.9, weight_decay: float = 1e-3
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = nn.Sequential(
            nn.Linear(10, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)
        )

    def forward(self, inputs: Tensor) -> Tensor:
        """Predict the standardised progression ``(B,)`` from ten measurements ``(B, 10)``."""
        return self.network(inputs).squeeze(-1)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Mean squared error."""
        loss = nn.functional.mse_loss(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the mean squared error."""
        self.log("val_loss", nn.functional.mse_loss(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """SGD whose learning rate falls to zero over the training."""
        optimizer = torch.optim.SGD(
            self.parameters(),
            lr=self.hparams["learning_rate"],
            momentum=self.hparams["momentum"],
            weight_decay=self.hparams["weight_decay"],
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
