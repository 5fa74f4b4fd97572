"""Benchmarks run, small: the tables of the documentation, and suggestions that retraining confirms."""

import logging
import runpy
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.suggestions import cases
from lightning_dtda import UnrolledDifferentiation

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.slow
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


def test_recording_with_seeds_apart_is_timed_beside_plain_seeds(monkeypatch, capsys):
    threads = torch.get_num_threads()
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning_dtda")]
    levels = [logger.level for logger in loggers]
    options = ["--models", "8-64-64-1", "--steps", "24", "--repeats", "2", "--crossed"]
    monkeypatch.setattr(sys, "argv", ["recording", *options])
    try:
        runpy.run_path(str(BENCHMARKS / "recording.py"), run_name="__main__")
    finally:
        torch.set_num_threads(threads)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
    rows = capsys.readouterr().out.splitlines()[-3:]
    assert [row[:26].strip() for row in rows] == ["plain seeds", "initialisation, order", "and noise"]
    assert "1.000 [1.000, 1.000]" in rows[0]


@pytest.mark.slow
def test_suggestions_do_on_fresh_seeds_what_the_verdict_says(tmp_path):
    one = {"default": UnrolledDifferentiation()}
    found = {each.suggestion.goal: each for each in cases(tmp_path, runs=20, seeds=40, estimators=one, cautions=(1.0,))}
    # the mean falls by a quarter; a suggestion for another goal need not be made, but must not do harm
    mean = found["improve_mean"]
    assert mean.real[mean.suggestion.best].high < 0
    for case in found.values():
        if best := case.suggestion.best:
            assert case.real[best].low < 0
