"""Influences of many examples on many queries in little memory, in a process of their own."""

import subprocess
import sys

import pytest

SCRIPT = """
import resource
from dataclasses import replace

import torch

from lightning_dtda.attribution.attribution import Attribution
from lightning_dtda.statistics.differences import DIFFERENCES, SlicedWasserstein

torch.set_num_threads(1)
runs, queries, examples = 50, 100, 50_000
responses = torch.empty(runs, queries, examples).normal_(generator=torch.Generator().manual_seed(0))
names = tuple(f"seed-{s:04d}" for s in range(runs))
attribution = Attribution(torch.randn(runs, queries), responses, names, tuple(range(queries)))
# queries are computed one after another: a few of them take the memory of all
few = replace(attribution, baseline=attribution.baseline[:, :2], responses=responses[:, :2], queries=(0, 1))
for name in DIFFERENCES:
    assert few.influence(name).shape == (2, examples)
    assert few.standard_error(name).shape == (2, examples)
assert attribution.joint_influence(SlicedWasserstein(4)).shape == (examples,)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux alone")
def test_every_difference_of_50_runs_100_queries_and_50000_examples_stays_within_2_gib():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # of them the responses alone are 0.93 GiB, Python with torch and lightning 0.75
    assert int(done.stdout) < 2 * 2**20
