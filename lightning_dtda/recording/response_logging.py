"""What a Trainer's loggers show of responses while a training runs."""

from __future__ import annotations

from collections.abc import Sequence, Set

import lightning.pytorch as pl
from torch import Tensor

_MOST = 5
"""Maximum number of groups in the table, and of examples that it names for each."""


def log_norms(trainer: pl.Trainer, norms: Tensor, groups: Sequence[Sequence[int]], batch: Set[int]) -> None:
    """Log how much the removal of groups has changed the parameters so far.

    Args:
        trainer: The Trainer whose loggers to use.
        norms: Norm of the response of each group ``(groups,)``.
        groups: Data set indices of the examples in each group.
        batch: Data set indices of the examples in the batch.
    """
    in_batch = [number for number, group in enumerate(groups) if not batch.isdisjoint(group)]
    in_batch.sort(key=norms.tolist().__getitem__, reverse=True)
    figures = {"median_norm": norms.median(), "largest_norm": norms.max()}
    if in_batch:
        figures["largest_norm_in_batch"] = norms[in_batch[0]]
    logged, step = {f"responses/{name}": figure.item() for name, figure in figures.items()}, trainer.global_step
    rows = [[number, _named(groups[number]), norms[number].item()] for number in in_batch[:_MOST]]
    for logger in trainer.loggers:
        logger.log_metrics(logged, step=step)
        if rows and hasattr(logger, "log_table"):
            columns = ["group", "examples", "norm of the response"]
            logger.log_table("responses/most_influential_in_batch", columns=columns, data=rows, step=step)


def _named(group: Sequence[int]) -> str:
    more = f" and {len(group) - _MOST} others" if len(group) > _MOST else ""
    return ", ".join(map(str, group[:_MOST])) + more
