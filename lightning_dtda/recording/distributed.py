"""Several processes of one training, which either all continue or all stop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import lightning.pytorch as pl

from lightning_dtda.errors import RecordingError


@contextmanager
def together(trainer: pl.Trainer) -> Iterator[None]:
    """Raise an error in every process if one process raises one inside; all processes must enter this context.

    Otherwise a process that continues after another one has stopped would wait for it at the next gradient.

    Raises:
        RecordingError: If another process raised an error; the message is the same.
    """
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
    strategy = trainer.strategy
    if not strategy.reduce_boolean_decision(own is None, all=True):
        errors = [strategy.broadcast(str(own or ""), source) for source in range(trainer.world_size)]
        raise own or RecordingError(next(filter(None, errors)))
