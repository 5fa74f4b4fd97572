"""How much memory a computation takes."""

import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from lightning_dtda.errors import CompatibilityError
from lightning_dtda.execution.memory import peak_memory

CPU = torch.device("cpu")
MIB = 2**18
"""Numbers in single precision that make a MiB."""


def test_what_is_alive_at_once_counts():
    def chain():
        for _ in range(5):
            torch.ones(MIB)
        return torch.ones(MIB) + torch.ones(MIB)  # the sum beside both

    assert peak_memory(chain, CPU) == 3 * 2**20


def test_what_an_operation_takes_for_itself_counts():
    values = torch.rand(MIB)
    returned = 4 * MIB + 8 * MIB  # numbers and places
    assert peak_memory(lambda: values.sort(), CPU) > returned


def test_a_profiler_that_runs_goes_on():
    layers = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
    inputs = torch.rand(32, 64)
    layers(inputs).sum().backward()  # gradients are there from now on

    def step():
        layers(inputs).sum().backward()

    wanted = peak_memory(step, CPU)
    with profile(activities=[ProfilerActivity.CPU]) as record:
        assert wanted / 2 < peak_memory(step, CPU) <= wanted  # what operations take for themselves is not seen
        torch.zeros(3).cumsum(0)
    assert any(event.name == "aten::cumsum" for event in record.events())


def test_a_torch_without_the_record_of_allocations_is_named(monkeypatch):
    monkeypatch.setattr("lightning_dtda.compatibility.profile", lambda **_: nullcontext())
    with pytest.raises(CompatibilityError, match=r"record of allocations cannot be found in torch.*Install versions"):
        peak_memory(lambda: torch.ones(3), CPU)


FAULTS = """
import resource, torch
from lightning_dtda.execution.memory import kept_pages

torch.set_num_threads(1)

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        [torch.ones(2**21) for _ in range(4)]  # at once, else a hole in the heap may do for all
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

with kept_pages(torch.device("cpu")):
    torch.ones(2**24)
faults()  # the first tensors' pages are fresh in any case
print(faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_ordinary_tensors_reuse_their_memory_afterwards():
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    # a tensor of 8 MiB has 2,048 pages of 4 KiB, which each of the 20 would take anew
    assert int(done.stdout) <= 2048
