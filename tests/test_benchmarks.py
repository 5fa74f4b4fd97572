"""Benchmarks run, small."""

import runpy
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.parametrize(("name", "rows"), [("power", 61), ("significance", 25)])
def test_tables_are_printed_in_full(name, rows, monkeypatch, capsys):
    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", [name, "--quick"])
    try:
        runpy.run_path(str(BENCHMARKS / f"{name}.py"), run_name="__main__")
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("| ") for line in printed) == rows
    assert not any("nan" in line for line in printed)
