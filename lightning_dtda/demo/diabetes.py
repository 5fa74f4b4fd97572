"""A small network for the disease progression of 442 diabetes patients (Efron, Hastie, Johnstone, Tibshirani, 2004)."""

from __future__ import annotations

from functools import cache

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_dtda.attribution import Shown


@cache
def _loaded(scaled: bool = True) -> tuple[list[str], Tensor, Tensor]:
    """Return the names of the measurements, the measurements of each patient, and the progression after a year."""
    from sklearn.datasets import load_diabetes

    data = load_diabetes(scaled=scaled)
    inputs, targets = (torch.as_tensor(array, dtype=torch.float32) for array in (data.data, data.target))
    return list(data.feature_names), inputs, targets


def _validation(patients: int) -> Tensor:
    return torch.arange(patients) % 5 == 0


def _standards(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation over the training patients."""
    training = values[~_validation(len(values))]
    return training.mean(0), training.std(0)


def show_patient(item: tuple[Tensor, Tensor]) -> Shown:
    """Show a standardised item of :class:`DiabetesData` in the units in which it was measured."""
    names, inputs, targets = _loaded(scaled=False)
    (mean, deviation), (level, scale) = _standards(inputs), _standards(targets)
    values = (item[0] * deviation + mean).tolist()
    fields = tuple((name, f"{value:.4g}") for name, value in zip(names, values, strict=True))
    return Shown(label=f"{float(item[1] * scale + level):.0f}", fields=fields)


class DiabetesData(pl.LightningDataModule):
    """The diabetes data bundled with scikit-learn, standardised, with every fifth patient used for validation.

    Args:
        batch_size: Number of examples in a batch.
    """

    def __init__(self, batch_size: int = 32) -> None:
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        """Load and split the data, in the same way for every seed."""
        _, inputs, targets = _loaded()
        validation = _validation(len(inputs))
        (mean, deviation), (level, scale) = _standards(inputs), _standards(targets)
        self.train, self.validation = (
            TensorDataset((inputs[part] - mean) / deviation, (targets[part] - level) / scale)
            for part in (~validation, validation)
        )

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return shuffled batches of the training set."""
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the validation set as one batch."""
        return DataLoader(self.validation, len(self.validation))


class DiabetesRegressor(pl.LightningModule):
    """A network with two hidden layers, trained on the squared error by SGD with momentum and a cosine schedule.

    Args:
        width: Number of units in a hidden layer.
        learning_rate: Learning rate of the first step.
        momentum: Momentum of SGD.
        weight_decay: Weight decay of SGD.
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

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Predict the progression ``(B,)`` in the unit in which it was measured."""
        level, scale = _standards(_loaded()[2])
        return self(batch[0]) * scale + level

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return and log the mean squared error."""
        loss = nn.functional.mse_loss(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the mean squared error."""
        self.log("val_loss", nn.functional.mse_loss(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return SGD with a learning rate that decreases to zero over the training."""
        optimizer = torch.optim.SGD(
            self.parameters(),
            lr=self.hparams["learning_rate"],
            momentum=self.hparams["momentum"],
            weight_decay=self.hparams["weight_decay"],
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
