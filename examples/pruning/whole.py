"""The loss, or the error rate, over a whole set of images as one query, which costs what one image does."""

import torch
from torch.nn import functional
from torch.utils.data import Dataset

FIGURES = ("loss", "error")


class Whole(Dataset):
    """A whole set of images as one query for each figure: its mean loss, its error rate."""

    def __init__(self, dataset, figures):
        self.images, self.labels = dataset.tensors
        self.figures = figures

    def __len__(self):
        return len(self.figures)

    def __getitem__(self, index):
        return self.images, self.labels, FIGURES.index(self.figures[index])


def measure(module, batch):
    """Return the mean loss or the error rate over the images of each query ``(B,)``."""
    images, labels, figure = batch
    scores = torch.cat([module(part) for part in images.flatten(0, 1).split(500)]).unflatten(0, images.shape[:2])
    loss = functional.cross_entropy(scores.movedim(-1, 1), labels, reduction="none").mean(1)
    return torch.where(figure == 0, loss, (scores.argmax(-1) != labels).to(loss.dtype).mean(1))
