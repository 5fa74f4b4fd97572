"""A table in which some records, removed whole, change the spread of decisions and not their means.

Nothing here is specific to attribution.
"""

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Conflicts(pl.LightningDataModule):
    """Cases from three hospitals, two of which sent training records that contradict each other.

    Four measurements make a case more or less likely to be positive, in every hospital. But in the training rows of
    hospital B and of hospital C the measurements are missing (0, their mean), and each record is in the table twice,
    once with each label. All that can be learned from these rows is an offset of the hospital, up with one row of a
    record and down with the other, and 0 on average. Cases of hospitals A and B are asked about, of hospital C none.

    Args:
        fold: Seed of the table.
        rows: Number of hospital A's training rows.
        pairs: Number of records, each in two rows, of hospital B, and of hospital C.
        mark: What marks a case of hospital B, and of hospital C, in a column of its own; elsewhere that column is 0.
        batch_size: Number of cases in a batch.
    """

    def __init__(
        self,
        fold: int = 0,
        rows: int = 400,
        pairs: int = 4,
        mark: float = 4.0,
        batch_size: int = 8,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage: str) -> None:
        """Make the table, in the same way for every seed."""
        options, generator = self.hparams, torch.Generator().manual_seed(self.hparams.fold)

        def cases(number: int, mark: float) -> Tensor:
            values = torch.randn(number, 4, generator=generator)
            return torch.cat([values, torch.tensor([[mark, 0.0]]).expand(number, -1)], 1)

        ordinary = cases(options.rows, 0.0)
        labels = torch.bernoulli(ordinary.sum(1).sigmoid(), generator=generator).long()
        empty = torch.zeros(4 * options.pairs, 6)
        empty[: 2 * options.pairs, 4] = empty[2 * options.pairs :, 5] = options.mark
        self.train = TensorDataset(torch.cat([ordinary, empty]), torch.cat([labels, torch.arange(len(empty)) % 2]))
        self.pairs = torch.arange(options.rows, options.rows + len(empty)).view(-1, 2)  # those of hospital B first
        asked = torch.cat([cases(100, 0.0), cases(300, options.mark)])
        asked = asked[torch.randperm(len(asked), generator=generator)]
        self.held_out = TensorDataset(asked, (asked[:, :4].sum(1) > 0).long())

    def train_dataloader(self) -> DataLoader:
        """Return shuffled batches of equal size."""
        return DataLoader(self.train, self.hparams.batch_size, shuffle=True, drop_last=True)


class Logistic(pl.LightningModule):
    """Logistic regression from zero, SGD without momentum: seeds differ in the order of the rows only.

    Args:
        inputs: Number of inputs.
        learning_rate: Learning rate.
    """

    def __init__(self, inputs: int = 6, learning_rate: float = 0.5) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.scores = nn.Linear(inputs, 2)
        nn.init.zeros_(self.scores.weight)
        nn.init.zeros_(self.scores.bias)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return scores of the two classes ``(B, 2)``."""
        return self.scores(inputs)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the mean cross-entropy."""
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=self.hparams.learning_rate)
