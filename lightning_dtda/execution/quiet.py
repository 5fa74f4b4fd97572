"""Silencing the output of trainings, or writing it to a file."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Silence Lightning's messages at the start and end of every fit, which drown out all others with many seeds."""
    names = ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            # about Lightning's code, the number of workers and the logging interval: not the user's mistakes
            warnings.filterwarnings("ignore", module="lightning.pytorch.utilities._pytree")
            warnings.filterwarnings("ignore", message=".*does not have many workers")
            warnings.filterwarnings("ignore", message=".*smaller than the logging interval")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def output_to(path: Path) -> Iterator[None]:
    """Write the output of this process and its children to a file; in a terminal, several at once get mixed up."""
    path.parent.mkdir(parents=True, exist_ok=True)
    streams = [(1, sys.stdout), (2, sys.stderr)]
    before = [os.dup(number) for number, _ in streams]
    with path.open("w", encoding="utf-8", errors="backslashreplace") as file:
        try:
            for number, stream in streams:
                stream.flush()
                os.dup2(file.fileno(), number)
            yield
        finally:
            for (number, stream), old in zip(streams, before, strict=True):
                stream.flush()
                os.dup2(old, number)
                os.close(old)
