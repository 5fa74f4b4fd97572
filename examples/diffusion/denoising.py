"""A denoising diffusion model (DDPM, Ho et al., 2020) of small images, with a noise and a time drawn in each step.

Nothing here is specific to attribution but :func:`denoising_loss`, which says what is asked about an image.
"""

import functools
import math
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, TensorDataset

MEASURED_TIMES, MEASURED_NOISES = 16, 4


class Digits(pl.LightningDataModule):
    """The 1,797 digits of scikit-learn, 8x8 pixels in [-1, 1]; the first 1,000 of a fixed shuffle are for training.

    Args:
        batch_size: Number of images in a batch.
    """

    def __init__(self, batch_size: int = 64, examples: int = 1000) -> None:
        super().__init__()
        self.batch_size, self.examples = batch_size, examples

    def setup(self, stage: str) -> None:
        """Load, shuffle and split the images, in the same way for every seed."""
        images = torch.as_tensor(load_digits().images, dtype=torch.float32)[:, None] / 8 - 1
        images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]
        self.train, self.validation = TensorDataset(images[: self.examples]), TensorDataset(images[1000:])

    def train_dataloader(self) -> DataLoader:
        """Return shuffled batches of equal size."""
        return DataLoader(self.train, self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        """Return the images that were held out."""
        return DataLoader(self.validation, self.batch_size)


class ImageFolder(Dataset):
    """Images of a folder and its sub-folders as ``(3, 32, 32)`` in [-1, 1], in the order of their paths."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor]:
        with Image.open(self.paths[index]) as image:
            pixels = np.asarray(image.convert("RGB").resize((32, 32), Image.Resampling.BILINEAR), dtype=np.float32)
        return (torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1),)


class Images(Digits):
    """PNG and JPEG files below a folder, of which a tenth is held out.

    Args:
        path: The folder.
        batch_size: Number of images in a batch.
    """

    def __init__(self, path: str, batch_size: int = 64) -> None:
        super().__init__(batch_size)
        self.path = path

    def setup(self, stage: str) -> None:
        """Find the files and hold out every tenth."""
        paths = sorted(p for p in Path(self.path).rglob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg"))
        self.train = ImageFolder([path for n, path in enumerate(paths) if n % 10])
        self.validation = ImageFolder(paths[::10])


class TimeEmbedding(nn.Module):
    """Sines and cosines of a time between 0 and 1."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", math.pi * 2 ** torch.linspace(0, 6, size // 2))

    def forward(self, time):
        """Embed times ``(B,)`` as ``(B, size)``."""
        angles = time[:, None] * self.frequencies
        return torch.cat([angles.sin(), angles.cos()], -1)


class MLP(nn.Module):
    """A residual network of fully connected layers: 54,000 parameters for 8x8 pixels and width 128.

    Args:
        pixels: Number of pixels of an image.
        width: Number of units in a hidden layer.
    """

    def __init__(self, pixels: int = 64, width: int = 128) -> None:
        super().__init__()
        self.time = TimeEmbedding(32)
        self.enter = nn.Linear(pixels + 32, width)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.leave = nn.Linear(width, pixels)

    def forward(self, images, time):
        """Predict the noise in images ``(B, ...)`` at times ``(B,)`` between 0 and 1."""
        hidden = self.enter(torch.cat([images.flatten(1), self.time(time)], -1))
        for layer in self.hidden:
            hidden = hidden + layer(functional.silu(hidden))
        return self.leave(functional.silu(hidden)).reshape(images.shape)


class Block(nn.Module):
    """Two convolutions with a residual connection, shifted by the time."""

    def __init__(self, entering: int, leaving: int, embedded: int) -> None:
        super().__init__()
        self.first, self.second = nn.GroupNorm(8, entering), nn.GroupNorm(8, leaving)
        self.widen = nn.Conv2d(entering, leaving, 3, padding=1)
        self.keep = nn.Conv2d(leaving, leaving, 3, padding=1)
        self.skip = nn.Conv2d(entering, leaving, 1)
        self.shift = nn.Linear(embedded, leaving)

    def forward(self, images, embedded):
        """Map ``(B, entering, H, W)`` to ``(B, leaving, H, W)``."""
        hidden = self.widen(functional.silu(self.first(images))) + self.shift(embedded)[:, :, None, None]
        return self.skip(images) + self.keep(functional.silu(self.second(hidden)))


class UNet(nn.Module):
    """A U-Net with three resolutions, for images of 32x32 pixels.

    Args:
        channels: Number of channels at the finest resolution, a multiple of 8.
        colours: Number of colours of an image.
    """

    def __init__(self, channels: int = 64, colours: int = 3) -> None:
        super().__init__()
        embedded = 2 * channels
        self.time = nn.Sequential(TimeEmbedding(32), nn.Linear(32, embedded), nn.SiLU())
        self.enter = nn.Conv2d(colours, channels, 3, padding=1)
        self.fine = Block(channels, channels, embedded)
        self.middle = Block(channels, 2 * channels, embedded)
        self.coarse = Block(2 * channels, 2 * channels, embedded)
        self.middle_up = Block(4 * channels, channels, embedded)
        self.fine_up = Block(2 * channels, channels, embedded)
        self.leave = nn.Conv2d(channels, colours, 3, padding=1)

    def forward(self, images, time):
        """Predict the noise in images ``(B, colours, 32, 32)`` at times ``(B,)`` between 0 and 1."""
        embedded = self.time(time)
        fine = self.fine(self.enter(images), embedded)
        middle = self.middle(functional.avg_pool2d(fine, 2), embedded)
        coarse = self.coarse(functional.avg_pool2d(middle, 2), embedded)
        middle = torch.cat([middle, functional.interpolate(coarse, scale_factor=2.0)], 1)
        middle = functional.interpolate(self.middle_up(middle, embedded), scale_factor=2.0)
        return self.leave(self.fine_up(torch.cat([fine, middle], 1), embedded))


class Diffusion(pl.LightningModule):
    """Predicts the noise in a noisy image, with the cosine schedule of Nichol and Dhariwal (2021).

    Args:
        network: Maps noisy images and times to noises.
        times: Number of steps from noise to image.
        learning_rate: Learning rate of Adam after a warm-up.
    """

    def __init__(self, network: nn.Module, times: int = 100, learning_rate: float = 5e-3) -> None:
        super().__init__()
        self.network, self.learning_rate = network, learning_rate
        kept = torch.cos((torch.linspace(0, 1, times + 1) + 0.008) / 1.008 * math.pi / 2) ** 2
        self.register_buffer("kept", (kept / kept[0])[1:].clamp(min=1e-3))

    def errors(self, images, time, noise):
        """Return the squared error of the predicted noise ``(B,)`` for images with noise at time steps ``(B,)``."""
        kept = self.kept[time].reshape(-1, *[1] * (images.ndim - 1))
        noisy = kept.sqrt() * images + (1 - kept).sqrt() * noise
        return (self.network(noisy, (time + 1) / len(self.kept)) - noise).square().flatten(1).mean(1)

    def training_step(self, batch, batch_idx):
        """Draw a time step and a noise for each image, and return the mean error."""
        (images,) = batch
        time = torch.randint(len(self.kept), (len(images),), device=images.device)
        return self.errors(images, time, torch.randn_like(images)).mean()

    def configure_optimizers(self):
        """Return Adam with a linear warm-up and a cosine decay."""
        optimizer, steps = torch.optim.Adam(self.parameters(), self.learning_rate), self.trainer.max_steps

        def factor(step):
            return min(1.0, (step + 1) / 50) * (1 + math.cos(math.pi * step / steps)) / 2

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @torch.no_grad()
    def sample(self, shape, seed=0):
        """Draw images of a shape ``(B, ...)``, from noise in small steps."""
        generator = torch.Generator().manual_seed(seed)
        images = torch.randn(shape, generator=generator)
        for step in reversed(range(len(self.kept))):
            kept, before = self.kept[step], self.kept[step - 1] if step else self.kept.new_ones(())
            noise = self.network(images, torch.full((len(images),), (step + 1) / len(self.kept)))
            clean = ((images - (1 - kept).sqrt() * noise) / kept.sqrt()).clamp(-1, 1)
            ratio = kept / before
            mean = (before.sqrt() * (1 - ratio) * clean + ratio.sqrt() * (1 - before) * images) / (1 - kept)
            deviation = ((1 - before) / (1 - kept) * (1 - ratio)).sqrt()
            images = mean + deviation * torch.randn(shape, generator=generator)
        return images


@functools.cache
def _fixed_noises(shape):
    """Return the same noises for every model and query: a draw would blur the difference between two models."""
    drawn = np.random.default_rng(0).standard_normal((MEASURED_TIMES * MEASURED_NOISES, *shape))
    return torch.as_tensor(drawn, dtype=torch.float32)


def denoising_loss(module, batch):
    """Measure each image's error ``(B,)``, averaged over fixed times and noises."""
    (images,) = batch
    times = torch.linspace(0, len(module.kept) - 1, MEASURED_TIMES).round().long().repeat(MEASURED_NOISES)
    times, noises = times.to(images.device), _fixed_noises(tuple(images.shape[1:])).to(images)
    errors = module.errors(
        images.repeat_interleave(len(times), 0),
        times.repeat(len(images)),
        noises.repeat(len(images), *[1] * noises[0].ndim),
    )
    return errors.reshape(len(images), -1).mean(1)


denoising_loss.range = (0.0, math.inf)
