"""``Trainer.fit`` inside a loop over trainings, which Ctrl+C and SIGTERM are to end."""

from __future__ import annotations

import gc
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from torch.nn.parameter import is_lazy
from typing_extensions import override

from lightning_dtda.interruption import Terminated
from lightning_dtda.units import GIB

_LARGE = GIB // 16
"""Size of a module from which earlier trainings are cleared away. A Trainer and its module refer to each other, and
Python's collector counts objects, not bytes: a fine-tuning leaves a hundred models in memory before it starts. It takes
0.2 s."""


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
    sigterm = _Sigterm()
    if trainer.world_size > 1:
        trainer.callbacks.append(sigterm)  # type: ignore[attr-defined]
    if sum(parameter.nbytes for parameter in module.parameters() if not is_lazy(parameter)) >= _LARGE:
        gc.collect()
    try:
        with _handlers_restored():
            trainer.fit(module, data)
    except SystemExit as end:
        if isinstance(end.__context__, KeyboardInterrupt) and not sigterm.received:
            raise KeyboardInterrupt from None
        if not (sigterm.received or trainer.received_sigterm):
            raise
    if sigterm.received or trainer.received_sigterm:
        raise Terminated
    if trainer.interrupted:  # by Ctrl+C, in versions of Lightning that let the program go on
        raise KeyboardInterrupt


class _Sigterm(pl.Callback):
    """Lets SIGTERM end a training of several processes as Ctrl+C does.

    Lightning's handler, in the middle of a batch, waits for the other processes, which wait for this one.
    """

    def __init__(self) -> None:
        self.received = False

    @override
    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.on_train_start(trainer, pl_module)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # only now, because Lightning has set its handler after all hooks of the set-up
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._interrupt)

    def _interrupt(self, number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self.received = True
        raise KeyboardInterrupt


@contextmanager
def _handlers_restored() -> Iterator[None]:
    """Restore the handlers of signals: after Ctrl+C before the first batch, Lightning leaves SIGINT ignored."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # not one that was set outside Python
                signal.signal(number, handler)
