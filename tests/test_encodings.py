"""Text is read and written as UTF-8, whatever the system's encoding."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = [path for folder in ("lightning_dtda", "examples", "benchmarks") for path in (ROOT / folder).rglob("*.py")]


def is_binary(call):
    modes = [part.value for part in (*call.args, *(k.value for k in call.keywords)) if isinstance(part, ast.Constant)]
    return any(isinstance(mode, str) and set(mode) <= set("rwxab+") and "b" in mode for mode in modes)


def opens_text(call):
    name = getattr(call.func, "attr", getattr(call.func, "id", None))
    if name in ("read_text", "write_text"):
        return True
    # classes of ours open ensembles and ground truths
    owner = getattr(getattr(call.func, "value", None), "id", "")
    return name == "open" and not owner[:1].isupper() and owner not in ("cls", "webbrowser") and not is_binary(call)


def test_text_files_are_opened_with_an_encoding():
    for path in SOURCES:
        calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
        without = [
            call.lineno for call in calls if opens_text(call) and all(k.arg != "encoding" for k in call.keywords)
        ]
        assert not without, f"{path}: lines {without}"
