"""A forecaster of neuralforecast, whose step draws windows from whole series; on the package ``pytorch_lightning``."""

import numpy as np
import pandas as pd
import torch
from neuralforecast.losses.pytorch import MAE
from neuralforecast.models import NHITS
from neuralforecast.tsdataset import TimeSeriesDataModule, TimeSeriesDataset

from tests.zoo.data import QUERIES

SERIES = 32


def _series(first: int, last: int) -> TimeSeriesDataset:
    """An item is a whole series of 30 steps."""
    stream, time = np.random.default_rng(0), np.arange(30)
    shifts = stream.uniform(0, 6, size=SERIES + QUERIES)
    values = np.sin(time / 3 + shifts[:, None]) + 0.1 * stream.normal(size=(SERIES + QUERIES, len(time)))
    table = pd.concat(
        pd.DataFrame({"unique_id": f"series-{n:02d}", "ds": time, "y": values[n]}) for n in range(first, last)
    )
    return TimeSeriesDataset.from_df(table)[0]


def neuralforecast_nhits():
    """The model seeds the generators itself, in its constructor and when fitting starts, hence ``random_seed``."""
    model = NHITS(
        h=3,
        input_size=6,
        loss=MAE(),
        mlp_units=3 * [[16, 16]],
        n_freq_downsample=[2, 1, 1],
        dropout_prob_theta=0.1,
        learning_rate=5e-3,
        max_steps=8,
        windows_batch_size=24,
        scaler_type="standard",
        random_seed=torch.initial_seed(),
    )
    return model, TimeSeriesDataModule(_series(0, SERIES), batch_size=8)


def neuralforecast_nhits_queries():
    return _series(SERIES, SERIES + QUERIES)
