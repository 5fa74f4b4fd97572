"""A table made so that some rows change the spread of decisions and not their means.

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
    once with each label. All that can be learned from these rows is an offset of the hospital, up with one row and down
    with the next, and 0 on average. Cases of hospitals A and B are asked about, of hospital C none.

    Args:
        fold: Seed of the table.
        noise: Share of hospital A's training labels that is made wrong.
        rows: Number of hospital A's training rows.
        pairs: Number of records, each in two rows, of hospital B, and of hospital C.
        marks: What marks a case of hospital B, and of hospital C, in a column of its own; elsewhere that column is 0.
        batch_size: Number of cases in a batch.
    """

    classes = ("negative", "positive")

    def __init__(
        self,
        fold: int = 0,
        noise: float = 0.0,
        rows: int = 400,
        pairs: int = 4,
        marks: tuple[float, float] = (4.0, 5.0),
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
        self.wrong = torch.randperm(options.rows, generator=generator)[: round(options.noise * options.rows)]
        labels[self.wrong] = 1 - labels[self.wrong]
        empty = torch.zeros(4 * options.pairs, 6)
        empty[: 2 * options.pairs, 4], empty[2 * options.pairs :, 5] = options.marks
        self.train = TensorDataset(torch.cat([ordinary, empty]), torch.cat([labels, torch.arange(len(empty)) % 2]))
        self.pairs = torch.arange(options.rows, options.rows + len(empty)).view(-1, 2)  # those of hospital B first
        asked = torch.cat([cases(100, 0.0), cases(300, options.marks[0])])
        asked = asked[torch.randperm(len(asked), generator=generator)]
        self.held_out = TensorDataset(asked, (asked[:, :4].sum(1) > 0).long())

    def train_dataloader(self) -> DataLoader:
        """Return shuffled batches of equal size."""
        return DataLoader(self.train, self.hparams.batch_size, shuffle=True, drop_last=True)

    def described(self, row: int) -> str:
        """Return a training row in words."""
        inputs, given = self.train.tensors
        marks = inputs[row, 4:].nonzero()[:, 0].tolist()
        wrong = ", wrong label" if row in self.wrong.tolist() else ""
        return f"row {row}: hospital {'BC'[marks[0]] if marks else 'A'}, {self.classes[int(given[row])]}{wrong}"


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
