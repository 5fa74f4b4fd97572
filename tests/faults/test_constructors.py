"""Constructors take what they say, and refuse anything else with an error of ours that names the argument."""

import contextlib
import inspect
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_dtda import Attribution, GroundTruth, TrajectoryRecorder, estimators
from lightning_dtda.errors import DTDAError
from lightning_dtda.execution import Processes, RayCluster
from lightning_dtda.recording import ResponseTracker
from lightning_dtda.statistics.differences import DIFFERENCES, Mean, SlicedWasserstein, Tail

pytestmark = pytest.mark.filterwarnings("ignore:Influences of")

SEARCH = settings(
    max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)

ARGUMENTS = [None, True, False, -1, 0, 1, 3, 10**30, 0.5, -0.5, 1.5, float("nan"), float("inf"), "", "auto", "x", "\0"]
ARGUMENTS += [[], [1], [[1, 2]], {}, {"a": 1}, (), b"x", object, np.float32(0.5), np.int64(3), Path("x")]

CLASSES = [
    TrajectoryRecorder,
    ResponseTracker,
    Processes,
    RayCluster,
    Mean,
    Tail,
    SlicedWasserstein,
    *(
        estimators.__dict__[name]
        for name in ("UnrolledDifferentiation", "InfluenceFunctions", "Source", "TracIn", "TRAK")
    ),
    *(estimators.__dict__[name] for name in ("GradientCosine", "GradientDot")),
    *(estimators.__dict__[name] for name in ("EKFAC", "KFAC", "Diagonal", "ExactHessian", "GaussNewton", "Hessian")),
]
NEEDED = {"root": "runs", "groups": [[1, 2]]}


@pytest.mark.parametrize("made", CLASSES, ids=lambda made: made.__name__)
@pytest.mark.parametrize("value", ARGUMENTS, ids=repr)
def test_an_argument_is_taken_or_refused_by_its_name(made, value):
    parameters = inspect.signature(made).parameters
    for name in parameters:
        arguments = {needed: one for needed, one in NEEDED.items() if needed in parameters} | {name: value}
        with contextlib.suppress(DTDAError):
            made(**arguments)


def small():
    return st.integers(0, 3)


SHAPES = st.lists(small(), max_size=4).map(tuple)
TENSORS = st.one_of(
    st.builds(
        lambda shape, dtype, value: torch.full(shape, value).to(dtype),
        SHAPES,
        st.sampled_from([torch.float32, torch.float64, torch.int64, torch.bool]),
        st.sampled_from([0.0, 1.0, float("nan"), float("inf")]),
    ),
    SHAPES.map(np.ones),
    st.sampled_from([None, [], [[1.0]], "x"]),
)
NAMES = st.one_of(
    st.lists(st.sampled_from(["a", "b", "c", "a/b", "", "..", 1, None]), max_size=3).map(tuple), st.none()
)
NUMBERS = st.one_of(
    st.lists(st.integers(-1, 3), max_size=3).map(tuple), st.sampled_from([("a",), None, (1.5,), (True,)])
)
ABOUT = st.dictionaries(
    st.sampled_from(["removals", "step", "chaotic", "drift", "diagnosis", "keep_top", "removal", "failures", "x"]),
    st.sampled_from(
        [None, [], {}, 3, -1, "leave-one-out", [{"name": "a", "examples": [0]}], ["a"], {"a": {}}, {"a": 1}]
    ),
    max_size=2,
)


@SEARCH
@given(TENSORS, TENSORS, NAMES, NUMBERS, ABOUT)
def test_an_attribution_fits_or_is_refused(baseline, responses, runs, queries, about):
    with contextlib.suppress(DTDAError):
        ask(Attribution(baseline, responses, runs, queries, about))


@SEARCH
@given(small(), small(), small(), st.sampled_from([0.0, 1.0, float("nan"), float("inf")]), ABOUT)
def test_an_attribution_of_any_size_answers_or_refuses(runs, queries, removals, value, about):
    responses = torch.full((runs, queries, removals), value)
    with contextlib.suppress(DTDAError):
        ask(Attribution(torch.ones(runs, queries), responses, tuple("abc"[:runs]), tuple(range(queries)), about))


def ask(attribution):
    repr(attribution)
    for difference in DIFFERENCES:
        with contextlib.suppress(DTDAError):
            attribution.influence(difference)
    for question in (attribution.standard_error, attribution.p_values, attribution.interval, attribution.reliability):
        with contextlib.suppress(DTDAError):
            question("mean")
    for question in (attribution.top, attribution.to_xarray, attribution.trusted, lambda: attribution.keep_top(1)):
        with contextlib.suppress(DTDAError):
            question()


@SEARCH
@given(TENSORS, TENSORS, st.one_of(st.lists(NUMBERS, max_size=3), st.none()), NUMBERS, NUMBERS, NUMBERS, ABOUT)
def test_a_ground_truth_fits_or_is_refused(measurements, baseline, removed, queries, seeds, baseline_seeds, about):
    with contextlib.suppress(DTDAError):
        ask_truth(GroundTruth(measurements, baseline, removed, queries, seeds, baseline_seeds, about))


@SEARCH
@given(small(), small(), small(), small(), st.sampled_from([0.0, float("nan"), float("inf")]), ABOUT)
def test_a_ground_truth_of_any_size_answers_or_refuses(subsets, seeds, baseline_seeds, queries, value, about):
    measurements, removed = torch.full((subsets, seeds, queries), value), tuple((k,) for k in range(subsets))
    each = tuple(range(queries)), tuple(range(seeds)), tuple(range(baseline_seeds))
    with contextlib.suppress(DTDAError):
        ask_truth(GroundTruth(measurements, torch.ones(baseline_seeds, queries), removed, *each, about))


def ask_truth(truth):
    repr(truth)
    truth.to_xarray()
    for question in (lambda: truth.influence("mean"), truth.finished, lambda: truth.unfinished):
        with contextlib.suppress(DTDAError):
            question()
