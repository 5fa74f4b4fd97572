"""Words that readers stumbled over stay out of messages, docstrings, comments and documentation."""

from __future__ import annotations

import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[1]
_PLACES = (
    "lightning_dtda",
    "docs",
    "examples",
    "benchmarks",
    "ground_truth",
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
)
_PROSE = {".md", ".jinja", ".yaml"}

_INSTEAD = {
    r"told (from|apart)|tells? apart": "distinguishable from",
    r"\bbegun\b|\bhitherto\b|\blest\b|\bthereof\b|\bin vain\b": "the word that people use today",
    r"\b(is|are|be|was|were) had\b|\bhad by\b": "the verb itself: computed, obtained, found",
    r"\bbears? with\b": "tolerates, is robust to",
    r"\bis no (difference|estimator|measurement|curvature|share|number)\b": "unknown, or what it must be",
    r"\b(if|where) it is none\b": "if it is invalid",
    r"\b(an?d|with|than|of|to|by|twice|,) as many (as not|of|on|others?|at once)\b": "the number",
    r"\bso many (steps|runs|seeds|times|terms|trainings|examples)\b": "that number of",
    r"\b(cannot|can|could|would|must) be told\b": "determined, distinguished",
}
"""Patterns of what must not be written, with what to write instead."""


def _prose() -> Iterator[tuple[Path, int, str]]:
    """Yield text for readers, with its file and first line: text files, comments and strings."""
    for place in _PLACES:
        path = _ROOT / place
        for file in sorted(path.rglob("*") if path.is_dir() else [path]):
            if file.suffix in _PROSE:
                yield file, 1, file.read_text()
            elif file.suffix == ".py":
                for token in tokenize.generate_tokens(io.StringIO(file.read_text()).readline):
                    if token.type in (tokenize.COMMENT, tokenize.STRING) or "MIDDLE" in tokenize.tok_name[token.type]:
                        yield file, token.start[0], token.string


@pytest.mark.parametrize("pattern", _INSTEAD)
def test_words_that_readers_stumble_over_are_not_written(pattern):
    # also across the end of a line, and of one string of several
    loose = re.compile(pattern.replace(" ", r"[\s#\"]+"), re.IGNORECASE)
    found = [
        f"{file.relative_to(_ROOT)}:{line + text[: match.start()].count(chr(10))}: {match.group()!r}"
        for file, line, text in _prose()
        for match in loose.finditer(text)
    ]
    assert not found, f"Write instead: {_INSTEAD[pattern]}.\n" + "\n".join(found)
