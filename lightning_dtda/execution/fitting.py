"""``Trainer.fit`` inside a loop over trainings, which Ctrl+C and SIGTERM are to end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl

from lightning_dtda.interruption import Terminated


def fit(trainer: pl.Trainer, module: pl.LightningModule, data: Any) -> None:
    """Call ``trainer.fit``, and raise what ended it.

    Lightning turns Ctrl+C into exit code 1 and SIGTERM into exit code 0, and ignores a SIGTERM during the last batch.

    Args:
        trainer: The Trainer.
        module: The module to train.
        data: A data module, a DataLoader, or ``None`` for modules with a ``train_dataloader`` method.

    Raises:
        KeyboardInterrupt: After Ctrl+C.
        Terminated: After SIGTERM.
    """
    try:
        with _handlers_restored(trainer):
            trainer.fit(module, data)
    except SystemExit as end:
        if isinstance(end.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        if not trainer.received_sigterm:
            raise
    if trainer.received_sigterm:
        raise Terminated
    if trainer.interrupted:  # by Ctrl+C, in versions of Lightning that let the program go on
        raise KeyboardInterrupt


@contextmanager
def _handlers_restored(trainer: pl.Trainer) -> Iterator[None]:
    """Restore the handlers of signals: after Ctrl+C before the first batch, Lightning leaves SIGINT ignored."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    if trainer.world_size > 1:
        # without another handler, Lightning stops all processes of the training together, after a batch
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # not one that was set outside Python
                signal.signal(number, handler)
