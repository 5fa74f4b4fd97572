"""Forecasters of pytorch-forecasting on synthetic series, with its own data set and loader."""

import numpy as np
import pandas as pd
from pytorch_forecasting import NHiTS, TemporalFusionTransformer, TimeSeriesDataSet
from pytorch_forecasting.data import GroupNormalizer
from pytorch_forecasting.metrics import SMAPE, QuantileLoss

from tests.zoo.data import QUERIES

PAST, FUTURE = 8, 3
LENGTH = 20
SERIES = 4


def _table(length: int) -> pd.DataFrame:
    """Waves with a trend for four shops, a weekday, and a price that is known ahead."""
    noise = np.random.default_rng(0).normal(scale=0.2, size=(SERIES, 40))
    time = np.arange(length)
    return pd.concat(
        pd.DataFrame(
            {
                "time": time,
                "shop": f"shop-{shop}",
                "weekday": [f"day-{day}" for day in time % 7],
                "price": 1.0 + 0.3 * np.cos(time / 3 + shop),
                "sales": 5.0 + shop + np.sin(time / 2 + shop) + 0.05 * time + noise[shop, :length],
            }
        )
        for shop in range(SERIES)
    ).reset_index(drop=True)


def _windows(**columns) -> TimeSeriesDataSet:
    return TimeSeriesDataSet(
        _table(LENGTH),
        time_idx="time",
        target="sales",
        group_ids=["shop"],
        max_encoder_length=PAST,
        max_prediction_length=FUTURE,
        **columns,
    )


def _rich_windows() -> TimeSeriesDataSet:
    """Pasts of 5 to 8 steps, with categories and reals known and unknown."""
    return _windows(
        min_encoder_length=5,
        static_categoricals=["shop"],
        time_varying_known_categoricals=["weekday"],
        time_varying_known_reals=["time", "price"],
        time_varying_unknown_reals=["sales"],
        target_normalizer=GroupNormalizer(groups=["shop"]),
        add_relative_time_idx=True,
        add_target_scales=True,
        add_encoder_length=True,
    )


def _plain_windows() -> TimeSeriesDataSet:
    """Pasts of 8 steps of the target alone."""
    return _windows(
        time_varying_unknown_reals=["sales"], target_normalizer=GroupNormalizer(groups=["shop"]), randomize_length=None
    )


def _later(training: TimeSeriesDataSet) -> TimeSeriesDataSet:
    """Windows that begin after those of the training, made with its encoders and scales."""
    later = TimeSeriesDataSet.from_dataset(
        training, _table(LENGTH + FUTURE + 1), min_prediction_idx=LENGTH, stop_randomization=True
    )
    later.index = later.index.head(QUERIES)
    return later


def temporal_fusion_transformer():
    """Variable selection, an LSTM, attention over time, quantiles; the Trainer clips as the package's tutorial says."""
    windows = _rich_windows()
    model = TemporalFusionTransformer.from_dataset(
        windows,
        learning_rate=0.01,
        hidden_size=8,
        attention_head_size=2,
        dropout=0.1,
        hidden_continuous_size=4,
        loss=QuantileLoss([0.1, 0.5, 0.9]),
        optimizer="adam",
    )
    return model, windows.to_dataloader(train=True, batch_size=8, num_workers=0)


def temporal_fusion_transformer_queries():
    return _later(_rich_windows())


def nhits():
    """Blocks that look back and ahead at several time scales; pooling and interpolation."""
    windows = _plain_windows()
    model = NHiTS.from_dataset(
        windows,
        learning_rate=5e-3,
        hidden_size=16,
        dropout=0.1,
        backcast_loss_ratio=0.1,
        loss=SMAPE(),
        optimizer="adam",
    )
    return model, windows.to_dataloader(train=True, batch_size=8, num_workers=0)


def nhits_queries():
    return _later(_plain_windows())
