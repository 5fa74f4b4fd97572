"""The spread over seeds of what the trainings themselves logged."""

from __future__ import annotations

import statistics
from typing import Any

import wandb

from lightning_dtda.trajectory import Ensemble


def spreads(ensemble: Ensemble) -> dict[str, float]:
    """Return mean, standard deviation and number over seeds of each metric that the trainings ended with.

    Example:
        ``{"seeds/val_loss/mean": 0.31, "seeds/val_loss/standard_deviation": 0.02, "seeds/val_loss/n": 20}``
    """
    found: dict[str, float] = {}
    for name in _names(ensemble):
        values = [run.manifest.metrics[name] for run in ensemble if name in run.manifest.metrics]
        found[f"seeds/{name}/mean"] = statistics.fmean(values)
        if len(values) > 1:
            found[f"seeds/{name}/standard_deviation"] = statistics.stdev(values)
        found[f"seeds/{name}/n"] = len(values)
    return found


def seed_table(ensemble: Ensemble) -> Any:
    """Return a W&B table of the metrics of each run."""
    names = _names(ensemble)
    rows = [[run.name, run.manifest.seed, *map(run.manifest.metrics.get, names)] for run in ensemble]
    return wandb.Table(["run", "seed", *names], data=rows)


def _names(ensemble: Ensemble) -> list[str]:
    return list(dict.fromkeys(name for run in ensemble for name in run.manifest.metrics))
