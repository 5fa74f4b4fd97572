"""Compiled steps, against eager autograd: the same numbers, and the eager way wherever there is no compiling."""

import logging
import shutil
from dataclasses import replace

import pytest
import torch
from torch import nn

from lightning_dtda.replay import compiled
from lightning_dtda.replay.batches import stack_leaves
from lightning_dtda.replay.compiled import CompiledAlone, CompiledStack
from lightning_dtda.replay.steps import StepBatch
from tests.replay.stacked_runs import CASES, Runs, close, cross_entropy, mlp
from tests.replay.steps import CPU, Stepping

WAYS = {"alone": CompiledAlone, "stacked": CompiledStack}

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="needs a C++ compiler"
)


@pytest.fixture
def as_it_is(monkeypatch):
    """A compiler that leaves graphs as they are, and notes them."""
    graphs = []
    monkeypatch.setattr(torch, "compile", lambda graph, **_: graphs.append(graph) or graph)
    return graphs


@pytest.fixture(params=WAYS.values(), ids=WAYS)
def way(request):
    return request.param


def assert_same(runs, compiled_way):
    found, expected = runs.products(compiled_way), runs.products(runs.eager)
    close(found.terms, expected.terms)
    close(found.products, expected.products)
    close(found.gradient, expected.gradient)
    assert found.statistics_cotangents.keys() == expected.statistics_cotangents.keys()
    for name, cotangents in expected.statistics_cotangents.items():
        close(found.statistics_cotangents[name], cotangents)
    gradient, after = runs.gradients(compiled_way)
    wanted, wanted_after = runs.gradients(runs.eager)
    close(gradient, wanted)
    for name, tensor in wanted_after.items():
        close(after[name], tensor)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("case", ["BatchNorm and dropout", "GroupNorm"])
def test_a_compiled_step_is_the_eager_one(case, way):
    torch.manual_seed(0)
    loss, make = CASES[case]
    runs = Runs(Stepping(loss, net=make().double()))
    steps = way(runs.eager)
    assert_same(runs, steps)
    assert steps.has_compiled


QUICK = {"dropout", "mixup"}
"""The cases that stand for all, where what is tested does not depend on the layers."""


@pytest.mark.parametrize(
    ("case", "micro_batches"),
    [(case, 1) if case in QUICK else pytest.param(case, 1, marks=pytest.mark.slow) for case in CASES]
    + [pytest.param(case, 2, marks=pytest.mark.slow) for case in sorted(QUICK)],
)
def test_what_is_compiled_computes_the_eager_step(case, micro_batches, way, as_it_is):
    torch.manual_seed(0)
    loss, make = CASES[case]
    runs = Runs(Stepping(loss, net=make().double()), micro_batches)
    steps = way(runs.eager)
    assert_same(runs, steps)
    assert steps.has_compiled
    assert len(as_it_is) == (2 if way is CompiledAlone else 1)


def test_the_gradient_is_computed_once_for_all_directions_of_a_run(as_it_is):
    runs = Runs(Stepping(cross_entropy, net=mlp(nn.Tanh()).double()))
    runs.products(CompiledAlone(runs.eager))
    first, second = (
        [node.target for node in graph.graph.nodes if node.target is torch.ops.aten.tanh.default] for graph in as_it_is
    )
    assert len(first) == 1
    assert not second


def test_what_cannot_be_compiled_is_run_as_it_is_and_said(way, monkeypatch, caplog):
    def refuse(_graph, **_arguments):
        raise RuntimeError("no working C++ compiler\nand more")

    monkeypatch.setattr(torch, "compile", refuse)
    caplog.set_level(logging.INFO)
    runs = Runs(Stepping(cross_entropy, net=mlp(nn.Tanh()).double()))
    steps = way(runs.eager)
    assert_same(runs, steps)
    assert not steps.has_compiled
    assert "are not compiled: no working C++ compiler" in caplog.text
    assert "and more" not in caplog.text


def test_a_compiled_step_that_computes_something_else_is_not_used(way, monkeypatch, caplog):
    monkeypatch.setattr(
        torch, "compile", lambda graph, **_: lambda *given: [part * (1 + 1e-6) for part in graph(*given)]
    )
    caplog.set_level(logging.INFO)
    runs = Runs(Stepping(cross_entropy, net=mlp(nn.Tanh()).double()))
    steps = way(runs.eager)
    assert_same(runs, steps)
    assert not steps.has_compiled
    assert "the compiled step computes something else" in caplog.text


def test_a_further_shape_is_compiled_once_it_has_come_often(way, as_it_is, monkeypatch):
    monkeypatch.setattr(compiled, "_OFTEN", 3)
    runs = Runs(Stepping(cross_entropy, net=mlp(nn.Tanh()).double()))
    steps = way(runs.eager)
    runs.products(steps)
    once = len(as_it_is)
    shorten(runs, 3)
    for _ in range(2):
        assert_same_products(runs, steps)
        assert len(as_it_is) == once
    assert_same_products(runs, steps)
    assert len(as_it_is) == 2 * once


def test_the_number_of_shapes_that_are_compiled_is_bounded(way, as_it_is, monkeypatch):
    monkeypatch.setattr(compiled, "_OFTEN", 1)
    monkeypatch.setattr(compiled, "_MOST_SHAPES", 2)
    runs = Runs(Stepping(cross_entropy, net=mlp(nn.Tanh()).double()))
    steps = way(runs.eager)
    for examples in (4, 3, 2):
        shorten(runs, examples)
        assert_same_products(runs, steps)
    assert len(as_it_is) == 2 * (2 if way is CompiledAlone else 1)


def shorten(runs, examples):
    """Leave examples of the batch out."""
    passes = [
        [replace(inputs, examples=examples, make=lambda rows, make=inputs.make: make(list(rows))) for inputs in of_run]
        for of_run in runs.passes
    ]
    runs.batch = StepBatch.of(
        [torch.arange(examples)] * len(passes), passes, CPU, lambda _: stack_leaves([one[0].batch() for one in passes])
    )


def assert_same_products(runs, steps):
    found, expected = runs.products(steps), runs.products(runs.eager)
    close(found.terms, expected.terms)
    close(found.products, expected.products)
