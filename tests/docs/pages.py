"""The documentation's code blocks: found in the pages, and run in order, page by page."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAGES = {path.stem: path for path in (*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md")}

_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w+)\n(?P<code>.*?)^(?P=indent)```", re.MULTILINE | re.DOTALL)
_NOTE = re.compile(r"<!-- (?P<name>[a-z ]+): (?P<value>.*?) -->")


@dataclass(frozen=True)
class Block:
    """A fenced block of code.

    Args:
        page: The page that it is on.
        line: Of the page, on which it starts.
        code: Without the indentation of the list that it is in.
        skipped: Whether a note above it says why it is not run.
    """

    page: Path
    line: int
    code: str
    skipped: bool


def blocks(page: Path, language: str) -> list[Block]:
    """Return a page's blocks in one language, in order."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        if match["language"] == language:
            before = text[: match.start()]
            code = re.sub(f"^{match['indent']}", "", match["code"], flags=re.MULTILINE)
            last_line = before.rstrip().rsplit("\n", 1)[-1]
            found.append(Block(page, before.count("\n") + 2, code, "<!-- not run: " in last_line))
    return found


def notes(page: Path) -> dict[str, str]:
    """Return what a page's invisible notes say: ``continues``, the page that it goes on from, and ``where``."""
    return {match["name"]: match["value"] for match in _NOTE.finditer(page.read_text(encoding="utf-8"))}


def run_page(page: Path, names: dict[str, Any]) -> dict[str, Any]:
    """Run a page's Python blocks in the working directory; an error names the page and its line."""
    for block in blocks(page, "python"):
        if not block.skipped:
            # empty lines in front: line numbers in a traceback are those of the page
            exec(compile("\n" * (block.line - 1) + block.code, str(block.page), "exec"), names)
    return names
