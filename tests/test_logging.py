"""Messages of the package: printed in a plain script, handed to the application's logging where it has set it up."""

from __future__ import annotations

import subprocess
import sys

import pytest

_SAY = "import logging, lightning_dtda; {setup}; logging.getLogger('lightning_dtda.part').info('needs 3 MiB')"


@pytest.mark.parametrize(
    ("setup", "printed"),
    [
        ("pass", "needs 3 MiB\n"),
        ("logging.basicConfig(level=logging.INFO)", "INFO:lightning_dtda.part:needs 3 MiB\n"),
        ("logging.basicConfig(); logging.getLogger('lightning_dtda').setLevel(logging.WARNING)", ""),
    ],
    ids=["plain", "configured after the import", "silenced"],
)
def test_messages_are_seen_once_whoever_prints_them(setup, printed):
    done = subprocess.run(
        [sys.executable, "-c", _SAY.format(setup=setup)], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stderr == printed
