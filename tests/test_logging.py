"""Messages of the package: printed in a plain script, handed to the application's logging where it has set it up."""

from __future__ import annotations

import subprocess
import sys

import pytest

_SAY = "import logging; {}; import lightning_dtda; {}; logging.getLogger('lightning_dtda.part').info('needs 3 MiB')"


@pytest.mark.parametrize(
    ("before", "setup", "printed"),
    [
        ("pass", "pass", "needs 3 MiB\n"),
        ("pass", "logging.basicConfig(level=logging.INFO)", "INFO:lightning_dtda.part:needs 3 MiB\n"),
        ("pass", "logging.basicConfig(); logging.getLogger('lightning_dtda').setLevel(logging.WARNING)", ""),
        ("logging.getLogger('lightning_dtda').setLevel(logging.ERROR)", "pass", ""),
    ],
    ids=["plain", "configured after the import", "silenced after it", "silenced before it"],
)
def test_messages_are_seen_once_whoever_prints_them(before, setup, printed):
    done = subprocess.run(
        [sys.executable, "-c", _SAY.format(before, setup)],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stderr == printed
