"""A classifier of pytorch_tabular, on a table of numbers and categories; on the package ``pytorch_lightning``."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
from pytorch_tabular import TabularModel
from pytorch_tabular.config import DataConfig, OptimizerConfig, TrainerConfig
from pytorch_tabular.models import CategoryEmbeddingModelConfig
from pytorch_tabular.tabular_datamodule import TabularDatamodule

from tests.zoo.data import QUERIES

ROWS = 40


@contextmanager
def _elsewhere() -> Iterator[None]:
    """Work in a folder that is gone afterwards: the package counts models in a file of the working directory."""
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(here)


def _rows() -> pd.DataFrame:
    stream = np.random.default_rng(0)
    numbers = stream.normal(size=(ROWS + QUERIES, 3))
    colours = stream.choice(["red", "green", "blue"], size=ROWS + QUERIES)
    label = (numbers[:, 0] + (colours == "red") > 0.3).astype(int)
    return pd.DataFrame({"a": numbers[:, 0], "b": numbers[:, 1], "c": numbers[:, 2], "colour": colours, "label": label})


def _prepared() -> tuple[TabularModel, TabularDatamodule]:
    """The package's own steps up to the data; rows kept out of the training serve it as validation."""
    with _elsewhere():
        tabular = TabularModel(
            data_config=DataConfig(target=["label"], continuous_cols=["a", "b", "c"], categorical_cols=["colour"]),
            model_config=CategoryEmbeddingModelConfig(
                task="classification", layers="24-12", dropout=0.1, use_batch_norm=True, learning_rate=5e-3
            ),
            optimizer_config=OptimizerConfig(),
            trainer_config=TrainerConfig(batch_size=8, accelerator="cpu", progress_bar="none", load_best=False),
            verbose=False,
        )
    rows = _rows()
    return tabular, tabular.prepare_dataloader(train=rows.iloc[:ROWS], validation=rows.iloc[ROWS:])


def tabular():
    """A net of linear layers and BatchNorm over embeddings; the package, too, hands its Trainer loaders."""
    model, rows = _prepared()
    return model.prepare_model(rows), rows.train_dataloader()


def tabular_queries():
    return _prepared()[1].val_dataloader().dataset
