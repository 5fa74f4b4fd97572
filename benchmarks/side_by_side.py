"""Packages side by side: a separate environment for each, and a separate process for each method.

The released versions are those that ``peers.py`` was written for. Missing environments are created from PyPI.
"""

import json
import os
import re
import subprocess
import time
import venv
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "kronfluence": ("kronfluence==1.0.1",),
    "dattri": ("dattri==0.3.0", "traker==0.3.2", "torchvision"),
    "dattri-llm": ("dattri-llm[transformers]==0.1.0", "safetensors", "numpy"),
    "curvlinops": ("curvlinops-for-pytorch==3.0.1", "safetensors", "numpy"),
    "bergson": ("bergson==2.5.1",),
}


def environment(directory: Path, package: str) -> Path:
    """Return the Python of a package's environment, which is created if it does not exist."""
    python = directory / package / "bin" / "python"
    if not python.exists():
        venv.create(python.parents[1], with_pip=True)
        torch_version = f"torch=={torch.__version__.partition('+')[0]}"  # the same for all sides
        subprocess.run([python, "-m", "pip", "install", "--quiet", torch_version, *PACKAGES[package]], check=True)
    return python


def trial(command: list[object], threads: int = 1) -> dict[str, float]:
    """Run a worker, and return the figures that it prints with :func:`account`."""
    settings = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    words = list(map(str, command))
    done = subprocess.run(words, cwd=ROOT, env=settings | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def account(answer: Callable[[], object]) -> None:
    """Call a function in a worker, and print its seconds and the memory of its process as JSON."""
    before = peak()
    started, cpu = time.perf_counter(), time.process_time()
    answer()
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    print("\n" + json.dumps({"seconds": seconds, "cpu": cpu, "peak MiB": peak(), "after one run MiB": before}))


def peak() -> float:
    """Return the peak resident memory of this process in MiB; ``getrusage`` would include the parent process."""
    return int(re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))[0]) / 1024
