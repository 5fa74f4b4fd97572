"""Small examples: scikit-learn's digits, and lists of whatever a case makes."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, Dataset

QUERIES = 5
"""Items held out of each training."""


class Items(Dataset):
    """A dataset of the given items, whatever they are."""

    def __init__(self, items: Sequence[Any]):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def generator(seed: int) -> torch.Generator:
    """A generator of its own, so that making data leaves the global ones alone."""
    return torch.Generator().manual_seed(seed)


def loader(dataset: Dataset, collate_fn: Callable | None = None, batch_size: int = 8) -> DataLoader:
    """What nearly every training script has."""
    return DataLoader(dataset, batch_size, shuffle=True, collate_fn=collate_fn)


def digits(first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images in [0, 1], ``(last - first, 1, 8, 8)``, and their labels, in an order that mixes the classes."""
    images, labels = _all_digits()
    return images[first:last].clone(), labels[first:last].clone()


@cache
def _all_digits():
    found = load_digits()
    order = torch.randperm(len(found.target), generator=generator(0))
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16
    return images[order], torch.tensor(found.target)[order]
