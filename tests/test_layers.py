"""Nothing imports upward: the contract is in pyproject.toml."""

import subprocess
import sys
from pathlib import Path

_LINT = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(cache_dir=None))"


def test_no_room_imports_one_above_it():
    # in a process of its own: import-linter configures logging, and disables all loggers that there are
    done = subprocess.run(
        [sys.executable, "-c", _LINT], cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
