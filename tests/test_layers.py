"""Nothing imports upward: the contract is in pyproject.toml. Nor does a test import another."""

import re
import subprocess
import sys
from pathlib import Path

_LINT = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))"

_IMPORT = re.compile(r"^\W*(?:from|import) (?:tests\b|\.).*?(?:\([^)]*\))?$", re.MULTILINE)
"""Of tests, one line or several in brackets; also in the code of a process that a test starts."""


def test_no_room_imports_one_above_it():
    # in a process of its own: import-linter configures logging, and disables all loggers that there are
    done = subprocess.run(
        [sys.executable, "-c", _LINT], cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_test_is_imported():
    # a module of tests can then be moved, renamed or run by itself; what several share is in modules of another name
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        for found in _IMPORT.findall(path.read_text(encoding="utf-8")):
            assert not re.search(r"\b(test_\w+|conftest)\b", found), f"{path}: {found.strip()}"
