"""Private names of torch and Lightning: used in one module, and substituted for one thread only."""

from __future__ import annotations

import ast
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import lightning_dtda
from lightning_dtda.compatibility import missing, replaced_recurrence, twice_differentiable_weight_norm
from lightning_dtda.errors import CompatibilityError

_PACKAGE = Path(lightning_dtda.__file__).parent
_DOCUMENTED = {"_replace", "_fields", "_asdict", "_plot"}
"""Names with an underscore that are documented: of named tuples, and of torchmetrics for metrics of one's own."""


def _private_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("lightning_dtda"):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        yield from ((node.lineno, name) for name in names if name.startswith("_") and not name.startswith("__"))


def test_private_names_of_others_are_used_in_one_module():
    files = {file: ast.parse(file.read_text()) for file in _PACKAGE.rglob("*.py")}
    own = {
        node.attr if isinstance(node, ast.Attribute) else node.name if hasattr(node, "name") else node.id
        for tree in files.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        or (isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Store))
    }
    found = [
        f"{file.relative_to(_PACKAGE)}:{line}: {name}"
        for file, tree in files.items()
        for line, name in _private_names(tree)
        if file.name != "compatibility.py" and name not in own | _DOCUMENTED
    ]
    assert not found


def _lstm(layer: nn.LSTM) -> torch.Tensor:
    return layer(torch.ones(3, 2, 4))[0]


def test_other_threads_keep_torchs_own_functions():
    layer = nn.LSTM(4, 5)
    own = _lstm(layer)
    called, found = [], []

    def stand_in(function, *arguments):
        called.append(threading.get_ident())
        return function(*arguments)

    with replaced_recurrence({"lstm": stand_in}):
        _lstm(layer)
        other = threading.Thread(target=lambda: found.append(_lstm(layer)))
        other.start()
        other.join()
    _lstm(layer)
    assert called == [threading.get_ident()]
    assert torch.equal(found[0], own)


def test_threads_that_overlap_have_each_their_own_and_leave_nothing_behind():
    layer, both_in, first_out = nn.LSTM(4, 5), threading.Barrier(2, timeout=60), threading.Event()
    function = torch._VF.lstm
    calls: dict[str, list[str]] = {"first": [], "second": []}

    def work(name: str) -> None:
        def stand_in(own, *arguments):
            calls[name].append(name)
            return own(*arguments)

        with replaced_recurrence({"lstm": stand_in}):
            both_in.wait()
            _lstm(layer)
            if name == "second":
                first_out.wait(60)
                _lstm(layer)  # the first one's end takes nothing away from it
        first_out.set()

    threads = [threading.Thread(target=work, args=(name,)) for name in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == {"first": ["first"], "second": ["second", "second"]}
    assert torch._VF.lstm == function


def test_inside_another_one_the_inner_counts():
    layer, calls = nn.LSTM(4, 5), []
    with replaced_recurrence({"lstm": lambda own, *arguments: calls.append("outer") or own(*arguments)}):
        with replaced_recurrence({"lstm": lambda own, *arguments: calls.append("inner") or own(*arguments)}):
            _lstm(layer)
        _lstm(layer)
    assert calls == ["inner", "outer"]


def test_weight_normalisation_is_torchs_own_again_afterwards():
    function, seen = torch._weight_norm, []

    @twice_differentiable_weight_norm()
    def fail() -> None:
        seen.append(torch._weight_norm)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert seen[0] is not function
    assert torch._weight_norm is function


def test_the_versions_to_install_are_those_that_the_package_asks_for():
    known = re.findall(r"(torch|lightning) ([\d.]+) to", str(missing("It", KeyError())))
    requirements = (_PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8")
    assert {name for name, _ in known} == {"torch", "lightning"}
    for name, lowest in known:
        assert re.search(rf'^    "{name}(\[.*\])?>={re.escape(lowest)}"', requirements, re.MULTILINE)


def test_a_version_that_lacks_a_name_is_named(monkeypatch):
    monkeypatch.delattr(torch, "_VF")
    with (
        pytest.raises(CompatibilityError, match=r"A function that recurrent layers call .* torch 2\.6 to"),
        replaced_recurrence({"lstm": len}),
    ):
        pass
