"""Several processes of one training: they go on together, or none does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import lightning.pytorch as pl

from lightning_dtda.errors import RecordingError


@contextmanager
def together(trainer: pl.Trainer) -> Iterator[None]:
    """Raise in every process what is raised inside in one; all of them have to come by here.

    A process that goes on while another has stopped would wait for it at the next gradient.

    Raises:
        RecordingError: If another process raised something, with its message.
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
