"""The variational autoencoder of scvi-tools on synthetic counts, under its own training plan."""

import anndata
import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from scvi.dataloaders import AnnDataLoader
from scvi.model import SCVI
from scvi.train import TrainingPlan
from torch.utils.data import DataLoader, Dataset

from tests.zoo.data import QUERIES

CELLS, GENES = 40, 30


def _cells(first: int, last: int) -> SCVI:
    """A model set up on cells of three kinds from two batches of an experiment."""
    stream = np.random.default_rng(0)
    rates = stream.gamma(1.0, 4.0, size=(3, GENES))
    counts = stream.poisson(rates[stream.integers(3, size=CELLS + QUERIES)])
    cells = anndata.AnnData(counts[first:last].astype(np.float32))
    cells.obs["batch"] = [f"batch-{n % 2}" for n in range(first, last)]
    SCVI.setup_anndata(cells, batch_key="batch")
    return SCVI(cells, n_hidden=24, n_latent=4, n_layers=1, dropout_rate=0.1)


def _plan(model: SCVI) -> TrainingPlan:
    return TrainingPlan(model.module, lr=5e-3, n_epochs_kl_warmup=4)


def scvi():
    """Trained as the package does: its loader gives its data set whole lists of indices, and collates nothing."""
    model = _cells(0, CELLS)
    return _plan(model), AnnDataLoader(model.adata_manager, batch_size=8, shuffle=True)


class Cells(Dataset):
    """The package's data set, one cell an item; the package itself fetches a batch with one look-up."""

    def __init__(self, model: SCVI):
        self.cells = model.adata_manager.create_torch_dataset()

    def __len__(self):
        return len(self.cells)

    def __getitem__(self, index):
        return {name: torch.as_tensor(rows[0]) for name, rows in self.cells[int(index)].items()}


def _held_out() -> SCVI:
    with isolate_rng():  # setting cells up looks at a random few of them, and a model that comes with them has weights
        return _cells(CELLS, CELLS + QUERIES)


def scvi_queries():
    return _held_out().adata_manager.create_torch_dataset()


def scvi_items():
    """The same with single cells as items, stacked by torch's loader."""
    model = _cells(0, CELLS)
    return _plan(model), DataLoader(Cells(model), batch_size=8, shuffle=True)


def scvi_items_queries():
    return Cells(_held_out())
