"""SIGTERM, by which schedulers take a machine back, ends a program in order, like Ctrl+C."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Terminated(SystemExit):
    """Raised when SIGTERM arrives. If nothing catches it, the program ends with exit code 143, without a traceback.

    The code is that of programs that SIGTERM ends at once, so ``first && second`` does not go on to the second.
    """

    def __init__(self, code: int = 128 + signal.SIGTERM) -> None:
        super().__init__(code)


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM raise :class:`Terminated`; an immediate end would leave other processes and partial files behind.

    Once it has arrived, SIGTERM is ignored. In threads other than the main one, and if the application handles SIGTERM
    itself, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def end(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # schedulers may repeat it, and tidying up takes a moment
        raise Terminated

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
