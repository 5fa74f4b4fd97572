"""Cost of attribution compared with that of recording: UCI Concrete, 20 runs x 20 queries x 927 examples.

    python benchmarks/attribution.py --data concrete.txt

Records the runs of ``examples/concrete``, then attributes them, in one process and with the same number of threads.
Prints wall and CPU times of both, and their ratios. The times include everything except imports: creating modules and
data, writing files, planning, reading files.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from lightning_dtda import Attribution
from lightning_dtda.cli import main as run_command

EXAMPLE = Path(__file__).parent.parent / "examples" / "concrete"


def clocked(function: Callable[[], object]) -> dict[str, float]:
    """Run a function; return wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--queries", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--directory", help="Keep the runs and the attribution here.")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sys.path.insert(0, str(EXAMPLE))
    root = Path(options.directory or tempfile.mkdtemp())
    ensemble, output = str(root / "concrete"), str(root / "attribution")

    record = ["record", "--config", str(EXAMPLE / "config.yaml"), "--data.path", options.data]
    # imports and caches, so neither side pays for them
    run_command([*record, "--ensemble", str(root / "warm-up"), "--seeds", "1", "--trainer.max_steps", "20"])
    recording = clocked(lambda: run_command([*record, "--ensemble", ensemble, "--seeds", str(options.seeds)]))
    question = ["--measurement", "prediction", f"--queries.indices={list(range(options.queries))}"]
    attributing = clocked(lambda: run_command(["attribute", "--ensemble", ensemble, "--output", output, *question]))
    runs, queries, examples = Attribution.load(output).responses.shape
    result = {
        "shape": f"{runs} runs x {queries} queries x {examples} examples",
        "seconds of recording": recording,
        "seconds of attribution": attributing,
        "ratio": {clock: attributing[clock] / recording[clock] for clock in recording},
    }
    print(json.dumps(result, indent=1 if not options.json else None))


if __name__ == "__main__":
    main()
